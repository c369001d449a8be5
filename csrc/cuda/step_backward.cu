// CUDA schedule of a step's backward from its output: one pass that gives the gradients of the coupling while u, which
// it recovers, is staged for the product x = A (u - c).
#include "cuda/coupling_kind.cuh"
#include "cuda/fused_product.cuh"
#include "cuda/net_patches.cuh"

namespace pyglow::cuda {
namespace {

// u - c, and beside it grad_u and grad_net_out. Patches: the vector path takes the net's tensors in patches.
template <class T, bool Patches>
struct StepSource {
  static constexpr int tensors = 5;
  static constexpr bool sums = false, computes = true, patches = Patches;
  static constexpr int spare = Patches ? width<T> : 0;
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
  bool wide;               // NetAccess's

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

  // As CoupledSource's couple_patches, where the thread's column begins at position p of sample n. The sums of the
  // product leave registers for one half of the net's output only, so raw and its gradient are in shared memory. They
  // leave none for the offsets of five tensors either, which are computed where they are used.
  __device__ __forceinline__ void uncouple_patches(T* tile, int stride, int64_t n, int64_t p, int64_t first, int same,
                                                   int inside, const Aside<T>& aside) const {
    const auto at = [&](const auto& x) { return n * x.sample + p * x.position; };
    const T weight = grad_log_det[n];
    const bool affine = kind.map != ScaleMap::none;
    const int half = static_cast<int>(transformed), apart = blockDim.x * blockDim.y * width<T>;
    T* const raws = aside.spare + thread_index() * width<T>;
#pragma unroll 1
    for (int begin = (same / width<T> + threadIdx.y) * width<T>; begin < inside; begin += width<T> * blockDim.y) {
      const int from = same - begin, to = inside - begin;  // rows of the patch
      T* row = tile + begin * stride + threadIdx.x * width<T>;
      const int c = static_cast<int>(first - kept) + begin;
      NetPatch<T> raw = {};
      if (affine) raw = fetch_patch(net_out, at(net_out), net_part<T>(c, half, half, wide));
      widen_patches(net_out.type, raw);
#pragma unroll
      for (int k = 0; k < width<T>; ++k) store_shared(raws + k * apart, raw.v[k]);
      const T* const y_row = y.data + at(y) + (first + begin) * y.channel;
#pragma unroll
      for (int k = 0; k < width<T>; ++k)
        if (k >= from && k < to) store_shared(row + k * stride, load_vector(y_row + k * y.channel));
      NetPatch<T> shift = fetch_patch(net_out, at(net_out), net_part<T>(c, 0, half, wide));
      widen_patches(net_out.type, shift);
      const T* grad_row = grad_y.data + at(grad_y) + (first + begin) * grad_y.channel;
      T* target = grad_u.data + at(grad_u) + (first + begin) * grad_u.channel;
#pragma unroll 1
      for (int k = 0; k < width<T>; ++k) {
        Vec<T> shift_row = shift.v[0];
        if (k >= from && k < to) {
          Vec<T> value = load_vector(row), raw_row = load_vector(raws + k * apart), grad = {};
          if (aside.wanted) grad = load_vector(grad_row);
          with_scale_map(kind.map, [&](auto map) {
            uncouple<decltype(map)::value, true>(value, grad, shift_row, raw_row, weight, center[first + begin + k]);
          });
          store_shared(row, value);
          if (aside.wanted) store_vector(target, grad);
          store_shared(raws + k * apart, raw_row);
        }
        rotate(shift, shift_row);
        row += stride;
        grad_row += grad_y.channel;
        target += grad_u.channel;
      }
      if (!aside.wanted) continue;
      store_patch(grad_net_out, at(grad_net_out), net_part<T>(c, 0, half, wide), shift);
#pragma unroll
      for (int k = 0; k < width<T>; ++k) raw.v[k] = load_vector(raws + k * apart);
      if (affine) store_patch(grad_net_out, at(grad_net_out), net_part<T>(c, half, half, wide), raw);
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
      [[maybe_unused]] int64_t n = 0, p = 0;  // see uncouple_patches
      if constexpr (Patches) {
        n = j / aside.positions;
        p = j - n * aside.positions;
      }
      const auto at = [&](int tensor) {
        if (Patches && tensor > 0) return n * steps().sample[tensor] + p * steps().position[tensor];
        return Vector ? columns.own[tensor] : columns.table[tensor * count + q];
      };
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
      if (Patches ? same >= inside : r >= inside) return;
      if constexpr (Patches) {
        uncouple_patches(tile, stride, n, p, first, same, inside, aside);
        return;
      }
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
//   In patches of channels-last tensors: 4, 8 and then, gradients of the state, one at a time; and 64 bytes more of
//   shared memory for each thread (double: 32).
// - Bound: memory up to about C = 128 (6 C values moved for C^2 multiply-adds), then the multiply-add units.
template <class T>
int step_backward(const StepBackwardArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (samples * positions == 0 || channels == 0) return cudaSuccess;
  const int64_t kept = channels - args.transformed;
  const auto vector_columns = [&](const auto&... x) { return (has_vector_columns(x, positions) && ...); };
  const bool vector = vector_columns(args.y, args.grad_y, read_only(args.grad_u), read_only(args.x));
  const NetAccess access =
      vector ? net_access<T>(kept, args.transformed, positions, args.net_out, args.grad_net_out) : NetAccess{};
  return with_patches(access, [&](auto patches) {
    const StepSource<T, decltype(patches)::value> source = {args.y,
                                                            args.net_out,
                                                            args.grad_y,
                                                            args.grad_u,
                                                            args.grad_net_out,
                                                            args.grad_log_det,
                                                            args.offset,
                                                            kept,
                                                            args.transformed,
                                                            channels_adjacent(args.y, positions),
                                                            args.kind,
                                                            access.wide};
    const T* const none = nullptr;
    return fused_product<T>(source, plain_sink(args.x, channels), args.inverse_matrix, channels, 1, none, samples,
                            channels, positions, access.vector(), {}, queue.stream);
  });
}

PYGLOW_CUDA_INSTANTIATE(step_backward, StepBackwardArgs)

}  // namespace pyglow::cuda
