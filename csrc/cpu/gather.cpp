// CPU schedules of the channel mixing by a permutation, alone and with a coupling in the same pass; compiled once per
// instruction set.
//
// Channel by channel: the row that channel i comes from is read, coupled if it is one of the transformed, and written
// to row i. Nothing is summed over channels, so each value passes through registers once.
#include "cpu/coupling_rows.h"
#include "cpu/isa.h"
#include "cpu/views.h"
#include "math/channel_mix.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

constexpr int64_t enough_tiles = 32;  // that share the work of a small batch among threads

// Rows that lie in memory as they are wanted are taken one at a time, and tiles are long. Of other layouts a cache line
// holds several channels: all rows of a tile should stay in cache.
template <class T>
TileShape gather_shape(int64_t samples, int64_t positions, int64_t channels, bool rows_in_place) {
  TileShape shape = tile_shape<T>(samples, positions, rows_in_place ? 1 : 2 * channels);
  while (shape.count() < enough_tiles && shape.length >= 16 * lanes<T>) {
    shape.length = round_up(shape.length / 2, lanes<T>);
    shape.per_sample = (positions + shape.length - 1) / shape.length;
  }
  return shape;
}

template <class T>
bool has_rows(const Strided<T>& x) {
  return x.position == 1;
}
template <class T>
bool has_rows(const Squeezed<T>& x) {
  return x.position == 1 && x.width == 0;
}
template <class Data>
bool has_rows(const NetTensor<Data>& x) {
  return x.position == 1;
}

// What is gathered into channel i, from row j = index[i] to a row of the output, which may be the same.
template <class T>
void gather_row(const Gather<T>& map, int64_t i, const T* from, T* to, int64_t length) {
  const T scale = map.scale[i], offset = map.offset == nullptr ? T(0) : map.offset[i];
  const T center = map.center == nullptr ? T(0) : map.center[map.index[i]];
  for (int64_t p = 0; p < length; p += lanes<T>)
    store<T>(to + p, math::gathered(math::centred(load<T>(from + p), center), scale, offset));
}

// Calls f.template operator()<Map, Order>(). Where no channel is transformed any map will do, as it meets no row: that
// of the additive coupling is taken.
template <class T, class F>
void with_coupling(const CouplingKind<T>& kind, int64_t transformed, const F& f) {
  with_kind(transformed == 0 ? ScaleMap::none : kind.map, kind.order, f);
}

// The rows of the net's output for transformed channel c; raw is not used without a scale.
template <class T>
struct NetRow {
  const T *shift, *raw;
};
template <ScaleMap Map, class T>
NetRow<T> read_net_row(const NetOutput& net_out, const Tile& tile, int64_t c, int64_t transformed, T* room) {
  const T* const shift = read_rows(net_out, tile, c, 1, room).data;
  if constexpr (Map == ScaleMap::none) return {shift, shift};
  return {shift, read_rows(net_out, tile, transformed + c, 1, room + tile.padded).data};
}

template <ScaleMap Map, Order O, bool Inverse, class T>
void gather_tiles(const GatherArgs<T>& args, const Threads& threads) {
  const int64_t channels = args.channels, transformed = args.transformed, kept = channels - transformed;
  const bool rows_in_place = has_rows(args.in) && has_rows(args.out) && (transformed == 0 || has_rows(args.net_out));
  const TileShape shape = gather_shape<T>(args.samples, args.positions, channels, rows_in_place);
  double* partials = static_cast<double*>(thread_scratch(Scratch::partials, (shape.count() + 1) * sizeof(double)));
  for_tiles<T>(shape, threads, 3 * channels, 4 * shape.length, [&](const Tile& tile, T* memory) {
    LogDetSum<T> log_det;
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t j = args.map.index[i];
      const T* from = read_rows(args.in, tile, j, 1, memory).data;
      const Rows<T> out = write_rows(args.out, tile, i, memory + tile.padded);
      if (j >= kept) {
        const NetRow<T> net = read_net_row<Map, T>(args.net_out, tile, j - kept, transformed, memory + 2 * tile.padded);
        couple_row<Map, O, Inverse>(from, net.shift, net.raw, out.data, tile, args.kind.params, log_det);
        from = out.data;
      }
      gather_row(args.map, i, from, out.data, tile.padded);
      write_back(args.out, tile, i, 1, out);
    }
    partials[tile.index] = log_det.total();
  });
  if (args.log_det != nullptr) sum_per_sample(partials, shape, Inverse ? -1.0 : 1.0, 0.0, args.log_det);
}

// Rows of one channel in the backward; those of the net are null where the channel is not transformed.
template <class T>
struct GatherBackwardRow {
  const T *in, *shift, *raw, *grad_out;
  T *grad_in, *grad_shift, *grad_raw;
};

template <class T>
struct RowSums {
  T scale, offset;
};

// One channel of a tile: y is formed again, and never stored. Padded positions add nothing, their grad_out being zero.
template <ScaleMap Map, Order O, bool Coupled, class T>
RowSums<T> gather_backward_row(const GatherBackwardRow<T>& row, T map_scale, T center, T grad_log_det, int64_t length,
                               const ScaleParams<T>& params) {
  Vec<T> sum_scale{}, sum_offset{};
  for (int64_t p = 0; p < length; p += lanes<T>) {
    const Vec<T> grad_out = load<T>(row.grad_out + p), grad_y = grad_out * map_scale;
    Vec<T> y = load<T>(row.in + p);
    if constexpr (!Coupled) {
      store<T>(row.grad_in + p, grad_y);
    } else if constexpr (Map == ScaleMap::none) {
      y = y + load<T>(row.shift + p);
      store<T>(row.grad_in + p, grad_y);
      store<T>(row.grad_shift + p, grad_y);
    } else {
      const Vec<T> shift = load<T>(row.shift + p);
      const math::Scale<Vec<T>> scale = math::scale_of<Map>(load<T>(row.raw + p), params);
      y = math::couple<O>(y, shift, scale.s);
      const auto grads = math::couple_backward<O>(y, shift, scale.s, grad_y, broadcast<T>(grad_log_det));
      store<T>(row.grad_in + p, grads.in);
      store<T>(row.grad_shift + p, grads.shift);
      store<T>(row.grad_raw + p, grads.log_s * scale.slope);
    }
    sum_scale += grad_out * math::centred(y, center);
    sum_offset += grad_out;
  }
  return {sum_lanes<T>(sum_scale), sum_lanes<T>(sum_offset)};
}

template <ScaleMap Map, Order O, class T>
void gather_backward_tiles(const GatherBackwardArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t channels = args.channels, transformed = args.transformed, kept = channels - transformed;
  const bool rows_in_place = has_rows(args.in) && has_rows(args.grad_out.all) && has_rows(args.grad_in) &&
                             (transformed == 0 || (has_rows(args.net_out) && has_rows(args.grad_net_out)));
  const TileShape shape = gather_shape<T>(args.samples, args.positions, channels, rows_in_place);
  Slots<double> slots(shape, 2 * channels, enough_tiles);  // of each channel's scale, then of each offset
  slots.partials =
      static_cast<double*>(thread_scratch(Scratch::partials, larger(1, slots.count * slots.size) * sizeof(double)));
  const int64_t work = 6 * channels * shape.length;
  slots.template add_tiles<T>(threads, work, 7 * shape.length, [&](const Tile& tile, T* memory, double* sums) {
    const auto room = [&](int64_t k) { return memory + k * tile.padded; };
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t j = args.map.index[i], c = j - kept;
      const T scale = args.map.scale[i], center = args.map.center == nullptr ? T(0) : args.map.center[j];
      const Rows<T> grad_in = write_rows(args.grad_in, tile, j, room(2));
      GatherBackwardRow<T> row{read_rows(args.in, tile, j, 1, room(0)).data,
                               nullptr,
                               nullptr,
                               read_row(args.grad_out, tile, i, room(1)),
                               grad_in.data,
                               nullptr,
                               nullptr};
      RowSums<T> sum;
      if (c < 0) {
        sum = gather_backward_row<Map, O, false>(row, scale, center, T(0), tile.padded, args.kind.params);
      } else {
        const NetRow<T> net = read_net_row<Map, T>(args.net_out, tile, c, transformed, room(3));
        const Rows<T> grad_shift = write_rows(args.grad_net_out, tile, c, room(5));
        const Rows<T> grad_raw = affine ? write_rows(args.grad_net_out, tile, transformed + c, room(6)) : grad_shift;
        row.shift = net.shift;
        row.raw = net.raw;
        row.grad_shift = grad_shift.data;
        row.grad_raw = grad_raw.data;
        sum = gather_backward_row<Map, O, true>(row, scale, center, args.grad_log_det[tile.sample], tile.padded,
                                                args.kind.params);
        write_back(args.grad_net_out, tile, c, 1, grad_shift);
        if (affine) write_back(args.grad_net_out, tile, transformed + c, 1, grad_raw);
      }
      write_back(args.grad_in, tile, j, 1, grad_in);
      sums[i] += static_cast<double>(sum.scale);
      sums[channels + i] += static_cast<double>(sum.offset);
    }
  });
  for (int64_t i = 0; i < channels; ++i) {
    args.grad_scale[i] = static_cast<T>(slots.total(i));
    args.grad_offset[i] = static_cast<T>(slots.total(channels + i));
  }
}

template <ScaleMap Map, Order O, class T>
void step_gather_backward_tiles(const StepGatherBackwardArgs<T>& args, const Threads& threads) {
  constexpr bool affine = Map != ScaleMap::none;
  const int64_t channels = args.channels, transformed = args.transformed, kept = channels - transformed;
  const bool rows_in_place = has_rows(args.y) && has_rows(args.grad_y) && has_rows(args.x) && has_rows(args.grad_u) &&
                             has_rows(args.net_out) && has_rows(args.grad_net_out);
  const TileShape shape = gather_shape<T>(args.samples, args.positions, channels, rows_in_place);
  for_tiles<T>(shape, threads, 6 * channels, 8 * shape.length, [&](const Tile& tile, T* memory) {
    const auto room = [&](int64_t k) { return memory + k * tile.padded; };
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t j = args.map.index[i], c = j - kept;
      const T* u = read_rows(args.y, tile, j, 1, room(0)).data;
      const T* const grad_y = read_rows(args.grad_y, tile, j, 1, room(1)).data;
      const Rows<T> x = write_rows(args.x, tile, i, room(2)), grad_u = write_rows(args.grad_u, tile, j, room(3));
      if (c < 0) {
        __builtin_memcpy(grad_u.data, grad_y, tile.padded * sizeof(T));
      } else {
        const NetRow<T> net = read_net_row<Map, T>(args.net_out, tile, c, transformed, room(4));
        const Rows<T> grad_shift = write_rows(args.grad_net_out, tile, c, room(6));
        const Rows<T> grad_raw = affine ? write_rows(args.grad_net_out, tile, transformed + c, room(7)) : grad_shift;
        const BackwardRow<T> row{u, net.shift, net.raw, grad_y, x.data, grad_u.data, grad_shift.data, grad_raw.data};
        couple_backward_row<Map, O, false>(row, args.grad_log_det[tile.sample], tile, args.kind.params);
        write_back(args.grad_net_out, tile, c, 1, grad_shift);
        if (affine) write_back(args.grad_net_out, tile, transformed + c, 1, grad_raw);
        u = x.data;
      }
      gather_row(args.map, i, u, x.data, tile.padded);
      write_back(args.x, tile, i, 1, x);
      write_back(args.grad_u, tile, j, 1, grad_u);
    }
  });
}

}  // namespace

template <class T>
void gather(const GatherArgs<T>& args, const Threads& threads) {
  with_coupling(args.kind, args.transformed, [&]<ScaleMap Map, Order O>() {
    if (args.kind.inverse) return gather_tiles<Map, O, true>(args, threads);
    return gather_tiles<Map, O, false>(args, threads);
  });
}

template <class T>
void gather_backward(const GatherBackwardArgs<T>& args, const Threads& threads) {
  with_coupling(args.kind, args.transformed,
                [&]<ScaleMap Map, Order O>() { gather_backward_tiles<Map, O>(args, threads); });
}

template <class T>
void step_gather_backward(const StepGatherBackwardArgs<T>& args, const Threads& threads) {
  with_coupling(args.kind, args.transformed,
                [&]<ScaleMap Map, Order O>() { step_gather_backward_tiles<Map, O>(args, threads); });
}

PYGLOW_CPU_INSTANTIATE(gather, GatherArgs)
PYGLOW_CPU_INSTANTIATE(gather_backward, GatherBackwardArgs)
PYGLOW_CPU_INSTANTIATE(step_gather_backward, StepGatherBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
