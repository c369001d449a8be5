// CPU schedules of the passes that join a coupling with a channel mixing; compiled once per instruction set.
//
// A tile's rows of the state between the two live in scratch only: contiguous, so that the product reads them as it
// would read a tensor.
#include "cpu/coupling_rows.h"
#include "cpu/isa.h"
#include "cpu/mix_sums.h"
#include "cpu/views.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// The net's output on a tile; raw is not used without a scale.
template <class T>
struct NetRows {
  Rows<const T> shift, raw;
};

template <ScaleMap Map, class T>
NetRows<T> read_net(const NetOutput& net_out, const Tile& tile, int64_t transformed, T* room) {
  const Rows<const T> shift = read_rows(net_out, tile, 0, transformed, room);
  if constexpr (Map == ScaleMap::none) return {shift, shift};
  return {shift, read_rows(net_out, tile, transformed, transformed, room + transformed * tile.padded)};
}

template <class T>
void subtract(const Rows<T>& rows, int64_t channels, const T* offset, int64_t length) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < length; i += lanes<T>)
      store<T>(rows.row(c) + i, math::centred(load<T>(rows.row(c) + i), offset[c]));
}

// between = couple(in) or uncouple(in), all channels; returns the sum of log s.
template <ScaleMap Map, Order O, bool Inverse, class T>
double couple_tile(const Rows<const T>& in, const NetRows<T>& net, const Rows<T>& between, const Tile& tile,
                   int64_t kept, int64_t transformed, const ScaleParams<T>& params) {
  for (int64_t c = 0; c < kept; ++c) __builtin_memcpy(between.row(c), in.row(c), tile.padded * sizeof(T));
  LogDetSum<T> log_det;
  for (int64_t c = 0; c < transformed; ++c)
    couple_row<Map, O, Inverse>(in.row(kept + c), net.shift.row(c), net.raw.row(c), between.row(kept + c), tile, params,
                                log_det);
  return log_det.total();
}

template <ScaleMap Map, Order O, bool Inverse, class T>
void coupling_mix_tiles(const CouplingMixArgs<T>& args, const Threads& threads) {
  const CouplingArgs<T>& half = args.coupling;
  const int64_t channels = half.channels, transformed = half.transformed, kept = channels - transformed;
  const TileShape shape = tile_shape<T>(half.samples, half.positions, channels);
  const int64_t packed_bytes = packed_size(channels) * sizeof(T);
  T* packed = static_cast<T*>(thread_scratch(Scratch::partials, packed_bytes + shape.count() * sizeof(double)));
  double* partials = reinterpret_cast<double*>(packed + packed_size(channels));
  pack_matrix(args.matrix, channels, false, packed);
  const int64_t room = channels * shape.length, half_room = transformed * shape.length;
  for_tiles<T>(shape, threads, 3 * channels, 4 * room + 2 * half_room, [&](const Tile& tile, T* memory) {
    const Rows<const T> in = read_rows(half.in, tile, 0, channels, memory);
    const NetRows<T> net = read_net<Map, T>(half.net_out, tile, transformed, memory + 3 * room);
    const Rows<T> between{memory + room, tile.padded};
    partials[tile.index] = couple_tile<Map, O, Inverse>(in, net, between, tile, kept, transformed, half.kind.params);
    if (Inverse) subtract(between, channels, args.offset, tile.padded);
    const Rows<T> out = write_rows(half.out, tile, 0, memory + 2 * room);
    product<T>(packed, {between.data, between.stride}, Inverse ? nullptr : args.offset, out, channels, tile.padded);
    write_back(half.out, tile, 0, channels, out);
  });
  sum_per_sample(partials, shape, Inverse ? -1.0 : 1.0, 0.0, half.log_det);
}

// Gradients of one tile of couple() or of its recovery, all channels; grad_in's kept rows are grad_out's.
template <ScaleMap Map, Order O, class T>
void backward_tile(const Rows<const T>& out, const NetRows<T>& net, const Rows<const T>& grad_out, T* const in,
                   const Rows<T>& grad_in, const Rows<T>& grad_shift, const Rows<T>& grad_raw, T grad_log_det,
                   const Tile& tile, int64_t kept, int64_t transformed, const ScaleParams<T>& params) {
  for (int64_t c = 0; c < kept; ++c) {
    if (grad_in.row(c) != grad_out.row(c)) __builtin_memcpy(grad_in.row(c), grad_out.row(c), tile.padded * sizeof(T));
    if (in != nullptr) __builtin_memcpy(in + c * tile.padded, out.row(c), tile.padded * sizeof(T));
  }
  for (int64_t c = 0; c < transformed; ++c) {
    const BackwardRow<T> row{out.row(kept + c),
                             net.shift.row(c),
                             net.raw.row(c),
                             grad_out.row(kept + c),
                             in == nullptr ? nullptr : in + (kept + c) * tile.padded,
                             grad_in.row(kept + c),
                             grad_shift.row(c),
                             grad_raw.row(c)};
    couple_backward_row<Map, O, false>(row, grad_log_det, tile, params);
  }
}

template <ScaleMap Map, Order O, class T>
void coupling_mix_backward_tiles(const CouplingMixBackwardArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t channels = args.channels, transformed = args.transformed, kept = channels - transformed;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, channels);
  const MixSums<T> sums(shape, channels, packed_size(channels));
  pack_matrix(args.matrix, channels, true, sums.memory());
  const int64_t room = channels * shape.length, half_room = transformed * shape.length;
  sums.add_tiles(threads, 4 * room, 5 * room + 4 * half_room, [&](const Tile& tile, T* memory) {
    T* net_room = memory + 5 * room;
    const Rows<const T> in = read_rows(args.in, tile, 0, channels, memory);
    const NetRows<T> net = read_net<Map, T>(args.net_out, tile, transformed, net_room);
    const Rows<T> y{memory + 3 * room, tile.padded}, grad_y{memory + room, tile.padded};
    couple_tile<Map, O, false>(in, net, y, tile, kept, transformed, args.kind.params);
    clear_padding(y, channels, tile);  // what the coupling makes of zeros is not zero, and enters the sums
    const Rows<const T> known_y{y.data, y.stride}, known_grad_y{grad_y.data, grad_y.stride};
    const Rows<const T> grad_out = read_rows(args.grad_out, tile, channels, memory + 4 * room);
    product<T>(sums.memory(), grad_out, nullptr, grad_y, channels, tile.padded);
    const Rows<T> grad_in = write_rows(args.grad_in, tile, 0, memory + 2 * room);
    const Rows<T> grad_shift = write_rows(args.grad_net_out, tile, 0, net_room + 2 * half_room);
    const Rows<T> grad_raw =
        affine ? write_rows(args.grad_net_out, tile, transformed, net_room + 3 * half_room) : grad_shift;
    backward_tile<Map, O, T>(known_y, net, known_grad_y, nullptr, grad_in, grad_shift, grad_raw,
                             args.grad_log_det[tile.sample], tile, kept, transformed, args.kind.params);
    write_back(args.grad_in, tile, 0, channels, grad_in);
    write_back(args.grad_net_out, tile, 0, transformed, grad_shift);
    if (affine) write_back(args.grad_net_out, tile, transformed, transformed, grad_raw);
    return Factors<T>{grad_out, known_y, tile.padded};
  });
  sums.total(args.grad_matrix, args.grad_offset);
}

template <ScaleMap Map, Order O, class T>
void step_backward_tiles(const StepBackwardArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t channels = args.channels, transformed = args.transformed, kept = channels - transformed;
  const TileShape shape = tile_shape<T>(args.samples, args.positions, channels);
  T* packed = static_cast<T*>(thread_scratch(Scratch::partials, packed_size(channels) * sizeof(T)));
  pack_matrix(args.inverse_matrix, channels, false, packed);
  const int64_t room = channels * shape.length, half_room = transformed * shape.length;
  for_tiles<T>(shape, threads, 4 * channels, 5 * room + 4 * half_room, [&](const Tile& tile, T* memory) {
    T* net_room = memory + 5 * room;
    const Rows<const T> y = read_rows(args.y, tile, 0, channels, memory);
    const NetRows<T> net = read_net<Map, T>(args.net_out, tile, transformed, net_room);
    const Rows<const T> grad_y = read_rows(args.grad_y, tile, 0, channels, memory + room);
    const Rows<T> u{memory + 2 * room, tile.padded};
    const Rows<T> grad_u = write_rows(args.grad_u, tile, 0, memory + 3 * room);
    const Rows<T> grad_shift = write_rows(args.grad_net_out, tile, 0, net_room + 2 * half_room);
    const Rows<T> grad_raw =
        affine ? write_rows(args.grad_net_out, tile, transformed, net_room + 3 * half_room) : grad_shift;
    backward_tile<Map, O, T>(y, net, grad_y, u.data, grad_u, grad_shift, grad_raw, args.grad_log_det[tile.sample], tile,
                             kept, transformed, args.kind.params);
    subtract(u, channels, args.offset, tile.padded);
    const Rows<T> x = write_rows(args.x, tile, 0, memory + 4 * room);
    product<T>(packed, {u.data, u.stride}, nullptr, x, channels, tile.padded);
    write_back(args.x, tile, 0, channels, x);
    write_back(args.grad_u, tile, 0, channels, grad_u);
    write_back(args.grad_net_out, tile, 0, transformed, grad_shift);
    if (affine) write_back(args.grad_net_out, tile, transformed, transformed, grad_raw);
  });
}

}  // namespace

template <class T>
void coupling_mix(const CouplingMixArgs<T>& args, const Threads& threads) {
  with_kind(args.coupling.kind.map, args.coupling.kind.order, [&]<ScaleMap Map, Order O>() {
    if (args.coupling.kind.inverse) return coupling_mix_tiles<Map, O, true>(args, threads);
    return coupling_mix_tiles<Map, O, false>(args, threads);
  });
}

template <class T>
void coupling_mix_backward(const CouplingMixBackwardArgs<T>& args, const Threads& threads) {
  with_kind(args.kind.map, args.kind.order,
            [&]<ScaleMap Map, Order O>() { coupling_mix_backward_tiles<Map, O>(args, threads); });
}

template <class T>
void step_backward(const StepBackwardArgs<T>& args, const Threads& threads) {
  with_kind(args.kind.map, args.kind.order,
            [&]<ScaleMap Map, Order O>() { step_backward_tiles<Map, O>(args, threads); });
}

PYGLOW_CPU_INSTANTIATE(coupling_mix, CouplingMixArgs)
PYGLOW_CPU_INSTANTIATE(coupling_mix_backward, CouplingMixBackwardArgs)
PYGLOW_CPU_INSTANTIATE(step_backward, StepBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
