// CUDA schedule of the coupling's gradients from its output, and of recovering its input: one pass over memory.
#include "core.h"
#include "cuda/coupling_kind.cuh"
#include "cuda/rows.cuh"
#include "math/coupling.h"

namespace pyglow::cuda {
namespace {

template <class T>
struct CouplingBackward {
  RowView<const T> out, grad_out, kept_out, kept_grad_out;
  RowView<T> in, grad_in, kept_in, kept_grad_in;  // in, kept_in: data may be null
  NetView<const void> shift, raw;
  NetView<void> grad_shift, grad_raw;
  Walk walk, kept_walk;
  const T* grad_log_det;  // (N,)
  int64_t samples, parts;
  ScaleParams<T> params;
};

template <class T>
struct One {
  T in, grad_in, grad_shift, grad_raw;
};

template <class K, class T>
__device__ __forceinline__ One<T> couple_backward_one(T out, T shift, T raw, T grad_out, T grad_log_det,
                                                      const ScaleParams<T>& params) {
  math::Scale<T> scale = {T(1), T(0), T(0)};
  if constexpr (K::affine) scale = math::scale_of<K::map>(raw, params);
  if constexpr (K::inverse) {
    const auto grad = math::uncouple_backward<K::order>(out, shift, scale.s, grad_out, grad_log_det);
    return {math::couple<K::order>(out, shift, scale.s), grad.in, grad.shift, grad.log_s * scale.slope};
  } else {
    const auto grad = math::couple_backward<K::order>(out, shift, scale.s, grad_out, grad_log_det);
    return {math::uncouple<K::order>(out, shift, scale.s), grad.in, grad.shift, grad.log_s * scale.slope};
  }
}

template <class T, class K, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 3 : 2)
    coupling_backward_kernel(const CouplingBackward<T> c) {
  constexpr int unit = unit_width<T, Vector>;
  for (int64_t task = blockIdx.x; task < c.samples * c.parts; task += gridDim.x) {
    const int64_t n = task / c.parts, part = task - n * c.parts;
    const T grad_log_det = c.grad_log_det[n];
    for_each_unit<unit>(c.walk, part, [&](int64_t row, int64_t i) {
      const Unit<T, Vector> out = load_unit<Vector>(c.out, n, row, i);
      const Unit<T, Vector> grad_out = load_unit<Vector>(c.grad_out, n, row, i);
      Unit<T, Vector> shift = fetch_unit<T, Vector>(c.shift, n, row, i), raw = {}, in, grad_in, grad_shift, grad_raw;
      if constexpr (K::affine) raw = fetch_unit<T, Vector>(c.raw, n, row, i);
      widen_net(c.shift.type, shift, raw);
#pragma unroll
      for (int k = 0; k < unit; ++k) {
        const One<T> one =
            couple_backward_one<K>(out.v[k], shift.v[k], raw.v[k], grad_out.v[k], grad_log_det, c.params);
        in.v[k] = one.in;
        grad_in.v[k] = one.grad_in;
        grad_shift.v[k] = one.grad_shift;
        grad_raw.v[k] = one.grad_raw;
      }
      if (c.in.data != nullptr) store_unit<Vector>(c.in, n, row, i, in);
      store_unit<Vector>(c.grad_in, n, row, i, grad_in);
      store_unit<Vector>(c.grad_shift, n, row, i, grad_shift);
      if constexpr (K::affine) store_unit<Vector>(c.grad_raw, n, row, i, grad_raw);
    });
    for_each_unit<unit>(c.kept_walk, part, [&](int64_t row, int64_t i) {
      store_unit<Vector>(c.kept_grad_in, n, row, i, load_unit<Vector>(c.kept_grad_out, n, row, i));
      if (c.kept_in.data != nullptr) store_unit<Vector>(c.kept_in, n, row, i, load_unit<Vector>(c.kept_out, n, row, i));
    });
  }
}

}  // namespace

// - Grid: samples by parts of 1024 to 8192 elements, at most max_blocks blocks, which then loop.
// - Occupancy: up to 80 registers (float), so 3 blocks of 256 threads on a multiprocessor; each thread has four 16-byte
//   loads in flight, 48 KB in all, more than bandwidth times latency (about 30 KB).
// - Bound: memory, eight values moved per element.
template <class T>
int coupling_backward(const CouplingBackwardArgs<T>& args, const Queue& queue) {
  if (args.samples == 0) return cudaSuccess;
  const int64_t transformed = args.transformed, kept = args.channels - transformed, positions = args.positions;
  const Rows rows = rows_of(positions, args.grad_in, args.out, args.net_out, args.grad_out, args.in, args.grad_net_out);
  const int64_t raw_channel = args.kind.map == ScaleMap::none ? 0 : transformed;
  CouplingBackward<T> c = {};
  c.out = row_view(args.out, rows, kept);
  c.shift = net_rows<T>(args.net_out, rows, 0);
  c.raw = net_rows<T>(args.net_out, rows, raw_channel);
  c.grad_out = row_view(args.grad_out, rows, kept);
  c.kept_out = row_view(args.out, rows, 0);
  c.kept_grad_out = row_view(args.grad_out, rows, 0);
  c.in = row_view(args.in, rows, kept);
  c.grad_in = row_view(args.grad_in, rows, kept);
  c.grad_shift = net_rows<T>(args.grad_net_out, rows, 0);
  c.grad_raw = net_rows<T>(args.grad_net_out, rows, raw_channel);
  c.kept_in = row_view(args.in, rows, 0);
  c.kept_grad_in = row_view(args.grad_in, rows, 0);
  c.grad_log_det = args.grad_log_det;
  c.samples = args.samples;
  c.parts = parts_of(args.samples, transformed * positions);
  c.params = args.kind.params;
  const auto vector_rows = [&](const auto&... views) { return (has_vector_rows(views, rows) && ...); };
  const auto vector_net = [&](const auto&... views) { return (has_vector_rows<T>(views, rows) && ...); };
  const bool vector =
      row_length(rows, transformed, positions) % width<T> == 0 && row_length(rows, kept, positions) % width<T> == 0 &&
      vector_rows(c.out, c.grad_out, c.kept_out, c.kept_grad_out, c.in, c.grad_in, c.kept_in, c.kept_grad_in) &&
      vector_net(c.shift, c.raw, c.grad_shift, c.grad_raw);
  const int unit = vector ? width<T> : 1;
  c.walk = walk_of(rows, transformed, positions, c.parts, unit);
  c.kept_walk = walk_of(rows, kept, positions, c.parts, unit);
  const dim3 threads = walk_threads(c.walk, c.kept_walk);
  const int64_t blocks = smaller(args.samples * c.parts, max_blocks);
  return with_kind(args.kind, [&](auto kind) {
    using K = decltype(kind);
    return vector ? launch(coupling_backward_kernel<T, K, true>, blocks, threads, 0, queue.stream, c)
                  : launch(coupling_backward_kernel<T, K, false>, blocks, threads, 0, queue.stream, c);
  });
}

PYGLOW_CUDA_INSTANTIATE(coupling_backward, CouplingBackwardArgs)

}  // namespace pyglow::cuda
