// CPU schedules of the coupling; compiled once per instruction set.
#include "cpu/coupling_rows.h"
#include "cpu/isa.h"
#include "cpu/views.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// The channels of a tile that are handled at a time. Rows that lie in memory as they are wanted are taken few at a
// time, and tiles are long: short pieces of many rows would touch a page each. Other layouts are copied to scratch, all
// channels of a short tile at once, so that what a cache line brings is used.
struct Plan {
  TileShape shape;
  int64_t rows;
};

template <class T>
Plan plan_of(int64_t samples, int64_t positions, int64_t transformed, int64_t tensors, bool rows_in_place) {
  if (!rows_in_place) return {tile_shape<T>(samples, positions, tensors * transformed), larger(transformed, 1)};
  const TileShape shape = tile_shape<T>(samples, positions, 1);
  return {shape, larger(1, smaller(transformed, 1024 / shape.length))};
}

// One tile at a time, all transformed channels; the log-det of each tile is kept and summed in order afterwards.
template <ScaleMap Map, Order O, bool Inverse, class T>
void coupling_tiles(const CouplingArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t transformed = args.transformed, kept = args.channels - transformed;
  const bool rows_in_place = args.in.position == 1 && args.net_out.position == 1 && args.out.position == 1;
  const auto [shape, group] = plan_of<T>(args.samples, args.positions, transformed, 4, rows_in_place);
  double* partials = static_cast<double*>(thread_scratch(Scratch::partials, (shape.count() + 1) * sizeof(double)));
  const int64_t room = group * shape.length;
  for_tiles<T>(shape, threads, 8 * transformed, 4 * room, [&](const Tile& tile, T* memory) {
    LogDetSum<T> log_det;
    for (int64_t first = 0; first < transformed; first += group) {
      const int64_t rows = smaller(group, transformed - first);
      const Rows<const T> in = read_rows(args.in, tile, kept + first, rows, memory);
      const Rows<const T> shift = read_rows(args.net_out, tile, first, rows, memory + room);
      const Rows<const T> raw =
          affine ? read_rows(args.net_out, tile, transformed + first, rows, memory + 2 * room) : shift;
      const Rows<T> out = write_rows(args.out, tile, kept + first, memory + 3 * room);
      for (int64_t c = 0; c < rows; ++c)
        couple_row<Map, O, Inverse>(in.row(c), shift.row(c), raw.row(c), out.row(c), tile, args.kind.params, log_det);
      write_back(args.out, tile, kept + first, rows, out);
    }
    partials[tile.index] = log_det.total();
    copy_rows(args.in, args.out, tile, 0, kept);
  });
  sum_per_sample(partials, shape, Inverse ? -1.0 : 1.0, 0.0, args.log_det);
}

template <ScaleMap Map, Order O, bool Inverse, class T>
void coupling_backward_tiles(const CouplingBackwardArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t transformed = args.transformed, kept = args.channels - transformed;
  const bool recover = args.in.data != nullptr;
  const bool rows_in_place = args.out.position == 1 && args.net_out.position == 1 && args.grad_out.position == 1 &&
                             args.grad_in.position == 1 && args.grad_net_out.position == 1 &&
                             (!recover || args.in.position == 1);
  const auto [shape, group] = plan_of<T>(args.samples, args.positions, transformed, 8, rows_in_place);
  const int64_t room = group * shape.length;
  for_tiles<T>(shape, threads, 12 * transformed, 8 * room, [&](const Tile& tile, T* memory) {
    for (int64_t first = 0; first < transformed; first += group) {
      const int64_t rows = smaller(group, transformed - first);
      const Rows<const T> out = read_rows(args.out, tile, kept + first, rows, memory);
      const Rows<const T> grad_out = read_rows(args.grad_out, tile, kept + first, rows, memory + room);
      const Rows<const T> shift = read_rows(args.net_out, tile, first, rows, memory + 2 * room);
      const Rows<const T> raw =
          affine ? read_rows(args.net_out, tile, transformed + first, rows, memory + 3 * room) : shift;
      const Rows<T> grad_in = write_rows(args.grad_in, tile, kept + first, memory + 4 * room);
      const Rows<T> grad_shift = write_rows(args.grad_net_out, tile, first, memory + 5 * room);
      const Rows<T> grad_raw =
          affine ? write_rows(args.grad_net_out, tile, transformed + first, memory + 6 * room) : grad_shift;
      const Rows<T> in = recover ? write_rows(args.in, tile, kept + first, memory + 7 * room) : Rows<T>{nullptr, 0};
      for (int64_t c = 0; c < rows; ++c) {
        const BackwardRow<T> row{
            out.row(c),     shift.row(c),      raw.row(c),     grad_out.row(c), recover ? in.row(c) : nullptr,
            grad_in.row(c), grad_shift.row(c), grad_raw.row(c)};
        couple_backward_row<Map, O, Inverse>(row, args.grad_log_det[tile.sample], tile, args.kind.params);
      }
      write_back(args.grad_in, tile, kept + first, rows, grad_in);
      write_back(args.grad_net_out, tile, first, rows, grad_shift);
      if (affine) write_back(args.grad_net_out, tile, transformed + first, rows, grad_raw);
      if (recover) write_back(args.in, tile, kept + first, rows, in);
    }
    copy_rows(args.grad_out, args.grad_in, tile, 0, kept);
    if (recover) copy_rows(args.out, args.in, tile, 0, kept);
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

PYGLOW_CPU_INSTANTIATE(coupling, CouplingArgs)
PYGLOW_CPU_INSTANTIATE(coupling_backward, CouplingBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
