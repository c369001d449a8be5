// CPU schedules of the coupling; compiled once per instruction set.
#include "cpu/coupling_rows.h"
#include "cpu/isa.h"
#include "cpu/views.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

constexpr int64_t tile_bytes = 24 * 1024;

// One tile at a time, all transformed channels; the log-det of each tile is kept and summed in order afterwards.
template <ScaleMap Map, Order O, bool Inverse, class T>
void coupling_tiles(const CouplingArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t transformed = args.transformed, kept = args.channels - transformed;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 4 * transformed, tile_bytes);
  double* partials = static_cast<double*>(thread_scratch(Scratch::partials, (shape.count() + 1) * sizeof(double)));
  parallel(threads, shape.count(), grain_of(8 * transformed * shape.length), [&](int64_t begin, int64_t end) {
    const int64_t room = transformed * shape.length;
    T* memory = static_cast<T*>(thread_scratch(Scratch::tile, 4 * room * sizeof(T)));
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at<T>(shape, index);
      const Rows<const T> in = read_rows(args.in, tile, kept, transformed, memory);
      const Rows<const T> shift = read_rows(args.net_out, tile, 0, transformed, memory + room);
      const Rows<const T> raw =
          affine ? read_rows(args.net_out, tile, transformed, transformed, memory + 2 * room) : shift;
      const Rows<T> out = write_rows(args.out, tile, kept, memory + 3 * room);
      Vec<T> log_det{};
      for (int64_t c = 0; c < transformed; ++c)
        log_det += couple_row<Map, O, Inverse>(in.row(c), shift.row(c), raw.row(c), out.row(c), tile, args.kind.params);
      partials[index] = static_cast<double>(sum_lanes<T>(log_det));
      write_back(args.out, tile, kept, transformed, out);
      copy_rows(args.in, args.out, tile, 0, kept);
    }
  });
  sum_per_sample(partials, shape, Inverse ? -1.0 : 1.0, 0.0, args.log_det);
}

template <ScaleMap Map, Order O, bool Inverse, class T>
void coupling_backward_tiles(const CouplingBackwardArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t transformed = args.transformed, kept = args.channels - transformed;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, 8 * transformed, 2 * tile_bytes);
  parallel(threads, shape.count(), grain_of(12 * transformed * shape.length), [&](int64_t begin, int64_t end) {
    const int64_t room = transformed * shape.length;
    T* memory = static_cast<T*>(thread_scratch(Scratch::tile, 8 * room * sizeof(T)));
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at<T>(shape, index);
      const bool recover = args.in.data != nullptr;
      const Rows<const T> out = read_rows(args.out, tile, kept, transformed, memory);
      const Rows<const T> grad_out = read_rows(args.grad_out, tile, kept, transformed, memory + room);
      const Rows<const T> shift = read_rows(args.net_out, tile, 0, transformed, memory + 2 * room);
      const Rows<const T> raw =
          affine ? read_rows(args.net_out, tile, transformed, transformed, memory + 3 * room) : shift;
      const Rows<T> grad_in = write_rows(args.grad_in, tile, kept, memory + 4 * room);
      const Rows<T> grad_shift = write_rows(args.grad_net_out, tile, 0, memory + 5 * room);
      const Rows<T> grad_raw =
          affine ? write_rows(args.grad_net_out, tile, transformed, memory + 6 * room) : grad_shift;
      const Rows<T> in = recover ? write_rows(args.in, tile, kept, memory + 7 * room) : Rows<T>{nullptr, 0};
      for (int64_t c = 0; c < transformed; ++c) {
        const BackwardRow<T> row{
            out.row(c),     shift.row(c),      raw.row(c),     grad_out.row(c), recover ? in.row(c) : nullptr,
            grad_in.row(c), grad_shift.row(c), grad_raw.row(c)};
        couple_backward_row<Map, O, Inverse>(row, args.grad_log_det[tile.sample], tile, args.kind.params);
      }
      write_back(args.grad_in, tile, kept, transformed, grad_in);
      write_back(args.grad_net_out, tile, 0, transformed, grad_shift);
      if (affine) write_back(args.grad_net_out, tile, transformed, transformed, grad_raw);
      copy_rows(args.grad_out, args.grad_in, tile, 0, kept);
      if (recover) {
        write_back(args.in, tile, kept, transformed, in);
        copy_rows(args.out, args.in, tile, 0, kept);
      }
    }
  });
}

}  // namespace

template <class T>
void coupling(const CouplingArgs<T>& args, const Threads& threads) {
  with_kind(args.kind.map, args.kind.order, [&]<ScaleMap Map, Order O>() {
    if (args.kind.inverse) return coupling_tiles<Map, O, true>(args, threads);
    return coupling_tiles<Map, O, false>(args, threads);
  });
}

template <class T>
void coupling_backward(const CouplingBackwardArgs<T>& args, const Threads& threads) {
  with_kind(args.kind.map, args.kind.order, [&]<ScaleMap Map, Order O>() {
    if (args.kind.inverse) return coupling_backward_tiles<Map, O, true>(args, threads);
    return coupling_backward_tiles<Map, O, false>(args, threads);
  });
}

template void coupling<float>(const CouplingArgs<float>&, const Threads&);
template void coupling<double>(const CouplingArgs<double>&, const Threads&);
template void coupling_backward<float>(const CouplingBackwardArgs<float>&, const Threads&);
template void coupling_backward<double>(const CouplingBackwardArgs<double>&, const Threads&);

}  // namespace pyglow::cpu::PYGLOW_ISA
