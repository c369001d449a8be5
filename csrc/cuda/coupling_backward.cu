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

template <bool Vector, class T>
__device__ __forceinline__ void copy_kept(const CouplingBackward<T>& c, int64_t n, int64_t part) {
  for_each_unit<unit_width<T, Vector>>(c.kept_walk, part, [&](int64_t row, int64_t i) {
    store_unit<Vector>(c.kept_grad_in, n, row, i, load_unit<Vector>(c.kept_grad_out, n, row, i));
    if (c.kept_in.data != nullptr) store_unit<Vector>(c.kept_in, n, row, i, load_unit<Vector>(c.kept_out, n, row, i));
  });
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
    copy_kept<Vector>(c, n, part);
  }
}

// The same with a channels-last net's output and gradient, in patches; the state goes by channels. One kernel for all
// kinds.
template <class T>
struct CouplingBackwardInPatches {
  CouplingBackward<T> state;  // its views of the net's tensors are not read
  NetOutput net_out;
  NetGrad grad_net_out;
  CouplingKind<T> kind;
  int64_t transformed, positions;
  bool wide;
};

template <class T>
__device__ __forceinline__ One<T> couple_backward_in_kind(const CouplingKind<T>& kind, const math::Scale<T>& scale,
                                                          T out, T shift, T grad_out, T grad_log_det) {
  const bool first = kind.order == Order::shift_scale;
  if (kind.inverse) {
    const auto grad = first ? math::uncouple_backward<Order::shift_scale>(out, shift, scale.s, grad_out, grad_log_det)
                            : math::uncouple_backward<Order::scale_shift>(out, shift, scale.s, grad_out, grad_log_det);
    return {couple_in(kind.order, out, shift, scale.s), grad.in, grad.shift, grad.log_s * scale.slope};
  }
  const auto grad = couple_backward_in(kind.order, out, shift, scale.s, grad_out, grad_log_det);
  return {uncouple_in(kind.order, out, shift, scale.s), grad.in, grad.shift, grad.log_s * scale.slope};
}

template <class T>
__global__ void __launch_bounds__(block_threads, 2)
    coupling_backward_patches_kernel(const CouplingBackwardInPatches<T> b) {
  const CouplingBackward<T>& c = b.state;
  const bool affine = b.kind.map != ScaleMap::none;
  const int half = static_cast<int>(b.transformed);
  const int64_t tasks = c.samples * c.parts;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t n = task / c.parts, part = task - n * c.parts;
    const T grad_log_det = c.grad_log_det[n];
    for_each_patch<T>(c.walk, part, b.positions, [&](int first, int64_t p) {
      const auto net_at = [&](const auto& net) { return n * net.sample + p * net.position; };
      const auto shifts = net_part<T>(first, 0, half, b.wide), raws = net_part<T>(first, half, half, b.wide);
      const T* const out = patch_start(c.out, n, first, p);
      const T* const grad_out = patch_start(c.grad_out, n, first, p);
      NetPatch<T> value = {}, grad = {}, raw = {};
#pragma unroll
      for (int k = 0; k < width<T>; ++k) {
        if (first + k >= half) break;
        value.v[k] = load_vector(out + k * c.out.step);
        grad.v[k] = load_vector(grad_out + k * c.grad_out.step);
      }
      NetPatch<T> shift = fetch_patch(b.net_out, net_at(b.net_out), shifts);
      if (affine) raw = fetch_patch(b.net_out, net_at(b.net_out), raws);
      widen_patches(b.net_out.type, shift, raw);
#pragma unroll 1
      for (int k = 0; k < width<T>; ++k) {
        Vec<T> value_row = value.v[0], grad_row = grad.v[0], shift_row = shift.v[0], raw_row = raw.v[0];
        if (first + k < half) {
          with_scale_map(b.kind.map, [&](auto map) {
#pragma unroll
            for (int i = 0; i < width<T>; ++i) {
              const math::Scale<T> scale = scale_at<decltype(map)::value>(raw_row.v[i], b.kind.params);
              const One<T> one =
                  couple_backward_in_kind(b.kind, scale, value_row.v[i], shift_row.v[i], grad_row.v[i], grad_log_det);
              value_row.v[i] = one.in;
              grad_row.v[i] = one.grad_in;
              shift_row.v[i] = one.grad_shift;
              raw_row.v[i] = one.grad_raw;
            }
          });
          if (c.in.data != nullptr) store_vector(patch_start(c.in, n, first + k, p), value_row);
          store_vector(patch_start(c.grad_in, n, first + k, p), grad_row);
        }
        rotate(value, {});
        rotate(grad, {});
        rotate(shift, shift_row);
        rotate(raw, raw_row);
      }
      store_patch(b.grad_net_out, net_at(b.grad_net_out), shifts, shift);
      if (affine) store_patch(b.grad_net_out, net_at(b.grad_net_out), raws, raw);
    });
    copy_kept<true>(c, n, part);
  }
}

}  // namespace

// - Grid: samples by parts of 1024 to 8192 elements, at most max_blocks blocks, which then loop.
// - Occupancy: up to 80 registers (float), so 3 blocks of 256 threads on a multiprocessor; each thread has four 16-byte
//   loads in flight, 48 KB in all, more than bandwidth times latency (about 30 KB).
// - Bound: memory, eight values moved per element.
// In patches: up to 128 registers, so 2 blocks; a thread has sixteen 16-byte loads in flight.
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
  const bool vector_state =
      row_length(rows, transformed, positions) % width<T> == 0 && row_length(rows, kept, positions) % width<T> == 0 &&
      vector_rows(c.out, c.grad_out, c.kept_out, c.kept_grad_out, c.in, c.grad_in, c.kept_in, c.kept_grad_in);
  const bool vector = vector_state && vector_net(c.shift, c.raw, c.grad_shift, c.grad_raw);
  const NetAccess access = vector_state && !vector && rows == Rows::channels
                               ? net_access<T>(kept, transformed, positions, args.net_out, args.grad_net_out)
                               : NetAccess{};
  const int unit = vector || access.patches() ? width<T> : 1;
  c.walk = access.patches() ? patch_walk<T>(transformed, positions, c.parts)
                            : walk_of(rows, transformed, positions, c.parts, unit);
  c.kept_walk = walk_of(rows, kept, positions, c.parts, unit);
  const dim3 threads = walk_threads(c.walk, c.kept_walk);
  const int64_t blocks = smaller(args.samples * c.parts, max_blocks);
  if (access.patches()) {
    const CouplingBackwardInPatches<T> in_patches = {c,           args.net_out, args.grad_net_out, args.kind,
                                                     transformed, positions,    access.wide};
    return launch(coupling_backward_patches_kernel<T>, blocks, threads, 0, queue.stream, in_patches);
  }
  return with_kind(args.kind, [&](auto kind) {
    using K = decltype(kind);
    return vector ? launch(coupling_backward_kernel<T, K, true>, blocks, threads, 0, queue.stream, c)
                  : launch(coupling_backward_kernel<T, K, false>, blocks, threads, 0, queue.stream, c);
  });
}

PYGLOW_CUDA_INSTANTIATE(coupling_backward, CouplingBackwardArgs)

}  // namespace pyglow::cuda
