// A source of tiles (tile_sources.cuh) that applies the coupling while it stages.
#pragma once
#include "cuda/coupling_kind.cuh"
#include "cuda/tile_sources.cuh"

namespace pyglow::cuda {

// couple(in), or uncouple(in) less a center.
template <class T>
struct CoupledSource {
  static constexpr int tensors = 2;
  static constexpr bool sums = true, computes = true;
  Strided<const T> in;
  NetOutput net_out;
  const T* center;  // (C,) or null
  int64_t kept, transformed;
  bool channels_adjacent;  // of `in` in memory, rather than positions
  CouplingKind<T> kind;

  __device__ Steps<2> steps() const { return {{in.sample, net_out.sample}, {in.position, net_out.position}}; }

  template <bool Vector>
  __device__ __forceinline__ void stage_centred(T* tile, int stride, int r, int q, Unit<T, Vector> value,
                                                int64_t channel) const {
    const T c = center != nullptr ? center[channel] : T(0);
#pragma unroll
    for (int i = 0; i < unit_width<T, Vector>; ++i) value.v[i] = math::centred(value.v[i], c);
    stage_unit<Vector>(tile, stride, r, q, value);
  }

  // Returns the sum of log s.
  template <ScaleMap Map, bool Vector>
  __device__ __forceinline__ T couple(Unit<T, Vector>& value, const Unit<T, Vector>& shift,
                                      const Unit<T, Vector>& raw) const {
    T log_s = T(0);
#pragma unroll
    for (int i = 0; i < unit_width<T, Vector>; ++i) {
      const math::Scale<T> scale = scale_at<Map>(raw.v[i], kind.params);
      value.v[i] = kind.inverse ? uncouple_in(kind.order, value.v[i], shift.v[i], scale.s)
                                : couple_in(kind.order, value.v[i], shift.v[i], scale.s);
      log_s += scale.log_s;
    }
    return log_s;
  }

  template <bool Vector>
  __device__ __forceinline__ void stage(T* tile, int stride, int rows, int64_t first, int64_t channels,
                                        const Columns<2>& columns, const Aside<T>& aside = {}) const {
    const int count = blockDim.x * width<T>;
    const int inside = static_cast<int>(smaller<int64_t>(rows, channels - first));
    const int same = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(inside, kept - first)));
    for_each_column<Vector, T>(channels_adjacent, [&](int q, int sharer, int step) {
      const int64_t in_at = Vector ? columns.own[0] : columns.table[q];
      const int64_t net_at = (Vector ? columns.own[1] : columns.table[count + q]) + (first - kept) * net_out.channel;
      const T* const start = in.data + in_at + first * in.channel;
      T log_s = T(0);
      int r = sharer;
      if (in_at != outside) {
        constexpr int batch = 4;  // rows whose loads are in flight together
        for (; r < same; r += batch * step) {
          Unit<T, Vector> value[batch];
#pragma unroll
          for (int b = 0; b < batch; ++b)
            if (r + b * step < same) value[b] = load_unit<Vector>(start + (r + b * step) * in.channel);
#pragma unroll
          for (int b = 0; b < batch; ++b) {
            const int row = r + b * step;
            if (row < same) stage_centred<Vector>(tile, stride, row, q, value[b], first + row);
          }
        }
        r = row_from(same, sharer, step);
        with_scale_map(kind.map, [&](auto map) {
          constexpr ScaleMap Map = decltype(map)::value;
          Unit<T, Vector> value = {}, shift = {}, raw = {};  // of the next row, loaded while this one is computed
          const auto load_row = [&](int row) {
            if (row >= inside) return;
            value = load_unit<Vector>(start + row * in.channel);
            shift = fetch_net<T, Vector>(net_out.data, net_out.type, net_at + row * net_out.channel);
            if constexpr (Map != ScaleMap::none)
              raw = fetch_net<T, Vector>(net_out.data, net_out.type, net_at + (row + transformed) * net_out.channel);
          };
          load_row(r);
#pragma unroll 1
          for (; r < inside; r += step) {
            Unit<T, Vector> now = value, now_shift = shift, now_raw = raw;
            load_row(r + step);
            widen_net(net_out.type, now_shift, now_raw);
            log_s += couple<Map, Vector>(now, now_shift, now_raw);
            stage_centred<Vector>(tile, stride, r, q, now, first + r);
          }
        });
      }
      for (; r < rows; r += step) stage_unit<Vector>(tile, stride, r, q, {});
      if (aside.wanted) {
        T& sum = aside.logs[sharer * aside.logs_stride + q];
        sum = first == 0 ? log_s : sum + log_s;
      }
    });
  }
};

template <class T>
CoupledSource<T> coupled_source(const Strided<const T>& in, const NetOutput& net_out, const T* center, int64_t channels,
                                int64_t transformed, int64_t positions, const CouplingKind<T>& kind) {
  return {in, net_out, center, channels - transformed, transformed, channels_adjacent(in, positions), kind};
}

template <class T>
bool has_vector_columns(const CoupledSource<T>& source, int64_t positions) {
  return has_vector_columns(source.in, positions) && has_vector_net<T>(source.net_out, positions);
}

}  // namespace pyglow::cuda
