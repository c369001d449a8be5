// CUDA schedule of a step's backward from its output: one pass that gives the gradients of the coupling while u, which
// it recovers, is staged for the product x = A (u - c).
#include "cuda/coupling_kind.cuh"
#include "cuda/fused_product.cuh"

namespace pyglow::cuda {
namespace {

// u - c, and beside it grad_u and grad_net_out.
template <class T>
struct StepSource {
  static constexpr int tensors = 5;
  static constexpr bool sums = false, computes = true;
  Strided<const T> y;
  NetOutput net_out;
  Strided<const T> grad_y;
  Strided<T> grad_u;
  NetGrad grad_net_out;
  const T* grad_log_det;  // (N,)
  const T* center;        // (C,)
  int64_t kept, transformed;
  bool channels_adjacent;  // of y in memory, rather than positions
  CouplingKind<T> kind;    // forward direction

  __device__ Steps<5> steps() const {
    return {{y.sample, net_out.sample, grad_y.sample, grad_u.sample, grad_net_out.sample},
            {y.position, net_out.position, grad_y.position, grad_u.position, grad_net_out.position}};
  }

  // One unit: value, which is y, becomes u - c; grad that of u; shift and raw become their gradients.
  template <ScaleMap Map, bool Vector>
  __device__ __forceinline__ void uncouple(Unit<T, Vector>& value, Unit<T, Vector>& grad, Unit<T, Vector>& shift,
                                           Unit<T, Vector>& raw, T weight, T c) const {
#pragma unroll
    for (int i = 0; i < unit_width<T, Vector>; ++i) {
      const math::Scale<T> scale = scale_at<Map>(raw.v[i], kind.params);
      const auto grads = couple_backward_in(kind.order, value.v[i], shift.v[i], scale.s, grad.v[i], weight);
      value.v[i] = math::centred(uncouple_in(kind.order, value.v[i], shift.v[i], scale.s), c);
      grad.v[i] = grads.in;
      shift.v[i] = grads.shift;
      raw.v[i] = grads.log_s * scale.slope;
    }
  }

  template <bool Vector>
  __device__ __forceinline__ void stage(T* tile, int stride, int rows, int64_t first, int64_t channels,
                                        const Columns<5>& columns, const Aside<T>& aside) const {
    constexpr int unit = unit_width<T, Vector>;
    const int count = blockDim.x * width<T>;
    const int inside = static_cast<int>(smaller<int64_t>(rows, channels - first));
    const int same = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(inside, kept - first)));
    for_each_column<Vector, T>(channels_adjacent, [&](int q, int sharer, int step) {
      const int64_t j = aside.begin + q * unit;
      const auto at = [&](int tensor) { return Vector ? columns.own[tensor] : columns.table[tensor * count + q]; };
      int r = sharer;
      if (at(0) == outside) {
        for (; r < rows; r += step) stage_unit<Vector>(tile, stride, r, q, {});
        return;
      }
      const auto y_at = [&](int row) { return y.data + at(0) + (first + row) * y.channel; };
      const auto grad_y_at = [&](int row) { return grad_y.data + at(2) + (first + row) * grad_y.channel; };
      const auto grad_u_at = [&](int row) { return grad_u.data + at(3) + (first + row) * grad_u.channel; };
      constexpr int batch = 2;  // rows whose loads are in flight together
#pragma unroll 1
      for (; r < same; r += batch * step) {
        Unit<T, Vector> value[batch], grad[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) {
          const int row = r + b * step;
          if (row < same) value[b] = load_unit<Vector>(y_at(row));
          if (row < same && aside.wanted) grad[b] = load_unit<Vector>(grad_y_at(row));
        }
#pragma unroll
        for (int b = 0; b < batch; ++b) {
          const int row = r + b * step;
          if (row >= same) break;
          const T c = center[first + row];
          if (aside.wanted) store_unit<Vector>(grad_u_at(row), grad[b]);
#pragma unroll
          for (int i = 0; i < unit; ++i) value[b].v[i] = math::centred(value[b].v[i], c);
          stage_unit<Vector>(tile, stride, row, q, value[b]);
        }
      }
      r = row_from(same, sharer, step);
      if (r >= inside) return;
      const T weight = grad_log_det[j / aside.positions];
      with_scale_map(kind.map, [&](auto map) {
        constexpr ScaleMap Map = decltype(map)::value;
        constexpr bool affine = Map != ScaleMap::none;
#pragma unroll 1
        for (; r < inside; r += step) {
          Unit<T, Vector> value = load_unit<Vector>(y_at(r)), raw = {}, grad = {};
          Unit<T, Vector> shift =
              fetch_net<T, Vector>(net_out.data, net_out.type, at(1) + (first - kept + r) * net_out.channel);
          if constexpr (affine)
            raw = fetch_net<T, Vector>(net_out.data, net_out.type,
                                       at(1) + (first - kept + r + transformed) * net_out.channel);
          if (aside.wanted) grad = load_unit<Vector>(grad_y_at(r));
          const T c = center[first + r];
          widen_net(net_out.type, shift, raw);
          uncouple<Map, Vector>(value, grad, shift, raw, weight, c);
          stage_unit<Vector>(tile, stride, r, q, value);
          if (!aside.wanted) continue;
          store_unit<Vector>(grad_u_at(r), grad);
          const int64_t target = at(4) + (first - kept + r) * grad_net_out.channel;
          store_net<Vector>(grad_net_out.data, grad_net_out.type, target, shift);
          if constexpr (affine)
            store_net<Vector>(grad_net_out.data, grad_net_out.type, target + transformed * grad_net_out.channel, raw);
        }
      });
    });
  }
};

}  // namespace

// - Grid: as coupling_mix; blocks of the first group of output channels give the gradients, those of the others, above
//   C = 128 and of small products, recover u again.
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor (double: 1); at most 47 KB of shared
//   memory. A thread has four 16-byte loads in flight while it stages, 32 KB on a multiprocessor, about bandwidth times
//   latency.
// - Bound: memory up to about C = 128 (6 C values moved for C^2 multiply-adds), then the multiply-add units.
template <class T>
int step_backward(const StepBackwardArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (samples * positions == 0 || channels == 0) return cudaSuccess;
  const int64_t kept = channels - args.transformed;
  const auto vector_columns = [&](const auto&... x) { return (has_vector_columns(x, positions) && ...); };
  const bool vector = vector_columns(args.y, args.grad_y, read_only(args.grad_u), read_only(args.x)) &&
                      has_vector_net<T>(args.net_out, positions) && has_vector_net<T>(args.grad_net_out, positions);
  const StepSource<T> source = {args.y,
                                args.net_out,
                                args.grad_y,
                                args.grad_u,
                                args.grad_net_out,
                                args.grad_log_det,
                                args.offset,
                                kept,
                                args.transformed,
                                channels_adjacent(args.y, positions),
                                args.kind};
  const T* const none = nullptr;
  return fused_product<T>(source, plain_sink(args.x, channels), args.inverse_matrix, channels, 1, none, samples,
                          channels, positions, vector, {}, queue.stream);
}

PYGLOW_CUDA_INSTANTIATE(step_backward, StepBackwardArgs)

}  // namespace pyglow::cuda
