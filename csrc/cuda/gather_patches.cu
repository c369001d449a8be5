// CUDA schedules of the gathers' transformed channels beside a channels-last net, in patches.
#include "cuda/gather_patches.cuh"

#include <cmath>

#include "cuda/rows.cuh"
#include "cuda/sample_sums.cuh"

namespace pyglow::cuda {
namespace {

constexpr int segment = patches_abreast;  // neighbouring threads whose patches lie side by side

// targets[c] = the channel that takes its values from transformed channel c, or `outside` if the index leaves c out.
// All threads of a block call it, before anything else.
template <class T>
__device__ __forceinline__ void find_targets(int* targets, const Gather<T>& map, int64_t channels,
                                             int64_t transformed) {
  for (int64_t c = threadIdx.x; c < transformed; c += blockDim.x) targets[c] = static_cast<int>(outside);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < channels; i += blockDim.x) {
    const int64_t c = source_channel(map, i, channels) - (channels - transformed);
    if (c >= 0) targets[c] = static_cast<int>(i);
  }
  __syncthreads();
}

// A block's way through parts of samples.
struct Parts {
  Walk walk;
  int64_t parts;
  bool wide;

  template <class F>
  __device__ __forceinline__ void for_each(int64_t samples, const F& f) const {
    for (int64_t task = blockIdx.x; task < samples * parts; task += gridDim.x) f(task / parts, task % parts, task);
  }
};

template <class T>
Parts parts_for(int64_t samples, int64_t transformed, int64_t positions, bool wide) {
  const int64_t parts = parts_of(samples, transformed * positions);
  return {patch_walk<T>(transformed, positions, parts), parts, wide};
}

// The rows of a patch: `width` channels from j on.
template <class T>
__device__ __forceinline__ NetPatch<T> load_rows(const Strided<const T>& x, int64_t n, int64_t j, int64_t p, int rows) {
  NetPatch<T> patch = {};
#pragma unroll
  for (int k = 0; k < width<T>; ++k)
    if (k < rows) patch.v[k] = load_vector(x.data + element_offset(x, n, j + k, p));
  return patch;
}

// The net's output for the patch that begins at transformed channel c.
template <class T>
struct NetPatches {
  NetPatch<T> shift, raw;
};
template <class T>
__device__ __forceinline__ NetPatches<T> fetch_patches(const NetOutput& net_out, ScaleMap map, int64_t n, int c,
                                                       int half, int64_t p, bool wide) {
  NetPatches<T> net = {};
  const int64_t at = n * net_out.sample + p * net_out.position;
  net.shift = fetch_patch(net_out, at, net_part<T>(c, 0, half, wide));
  if (map != ScaleMap::none) net.raw = fetch_patch(net_out, at, net_part<T>(c, half, half, wide));
  return net;
}
template <class T>
__device__ __forceinline__ void store_patches(const NetGrad& grad, ScaleMap map, int64_t n, int c, int half, int64_t p,
                                              bool wide, const NetPatches<T>& net) {
  const int64_t at = n * grad.sample + p * grad.position;
  store_patch(grad, at, net_part<T>(c, 0, half, wide), net.shift);
  if (map != ScaleMap::none) store_patch(grad, at, net_part<T>(c, half, half, wide), net.raw);
}

template <class T>
struct GatherPatches {
  GatherArgs<T> args;
  Parts parts;
  double* partials;  // (N, parts), if there are several parts
};

template <class T>
__global__ void __launch_bounds__(block_threads, 2) gather_patches_kernel(const GatherPatches<T> pass) {
  PYGLOW_DYNAMIC_SHARED(int, targets);
  const GatherArgs<T>& args = pass.args;
  const Gather<T>& map = args.map;
  const CouplingKind<T>& kind = args.kind;
  const int half = static_cast<int>(args.transformed);
  const int64_t kept = args.channels - args.transformed;
  find_targets(targets, map, args.channels, args.transformed);
  pass.parts.for_each(args.samples, [&](int64_t n, int64_t part, int64_t task) {
    T log_s = T(0);
    for_each_patch<T>(pass.parts.walk, part, args.positions, [&](int first, int64_t p) {
      NetPatch<T> value = load_rows<T>(args.in, n, kept + first, p, half - first);
      NetPatches<T> net = fetch_patches<T>(args.net_out, kind.map, n, first, half, p, pass.parts.wide);
      widen_patches(args.net_out.type, net.shift, net.raw);
#pragma unroll 1
      for (int k = 0; k < smaller(width<T>, half - first); ++k) {
        Vec<T> row = value.v[0];
        with_scale_map(kind.map, [&](auto scale_map) {
#pragma unroll
          for (int l = 0; l < width<T>; ++l) {
            const math::Scale<T> scale = scale_at<decltype(scale_map)::value>(net.raw.v[0].v[l], kind.params);
            row.v[l] = kind.inverse ? uncouple_in(kind.order, row.v[l], net.shift.v[0].v[l], scale.s)
                                    : couple_in(kind.order, row.v[l], net.shift.v[0].v[l], scale.s);
            log_s += scale.log_s;
          }
        });
        const int i = targets[first + k];
        if (i != outside) {
          const T scale = map.scale[i], center = map.center == nullptr ? T(0) : map.center[kept + first + k];
          const T offset = map.offset == nullptr ? T(0) : map.offset[i];
#pragma unroll
          for (int l = 0; l < width<T>; ++l) row.v[l] = math::gathered(math::centred(row.v[l], center), scale, offset);
          store_vector(args.out.data + element_offset(args.out, n, i, p), row);
        }
        rotate(value, {});
        rotate(net.shift, {});
        rotate(net.raw, {});
      }
    });
    if (args.log_det == nullptr) return;
    const double sum = block_sum(kind.inverse ? -static_cast<double>(log_s) : static_cast<double>(log_s));
    if (threadIdx.x != 0) return;
    if (pass.parts.parts == 1) {
      args.log_det[n] = static_cast<T>(sum);
    } else {
      pass.partials[task] = sum;
    }
  });
}

template <class T>
struct BackwardPatches {
  GatherBackwardArgs<T> args;
  PatchShares shares;
  bool wide;
};

// A thread keeps its group of channels, one of the `abreast` that its block has, and walks the positions of the block's
// split; segments of threads have the same group.
template <class T>
__global__ void __launch_bounds__(block_threads, 2) gather_backward_patches_kernel(const BackwardPatches<T> pass) {
  PYGLOW_DYNAMIC_SHARED(int, targets);
  PYGLOW_SHARED(double, segment_sums, 2 * width<T> * (block_threads / segment));
  const GatherBackwardArgs<T>& args = pass.args;
  const SplitGrad<T>& grad_out = args.grad_out;
  const CouplingKind<T>& kind = args.kind;
  const int half = static_cast<int>(args.transformed), abreast = pass.shares.abreast;
  const int64_t kept = args.channels - args.transformed, units = args.samples * args.positions / width<T>;
  const int64_t packs = divide_up(half, abreast * width<T>);
  const int own_segment = threadIdx.x / segment, segments = blockDim.x / segment;
  find_targets(targets, args.map, args.channels, args.transformed);
  for (int64_t task = blockIdx.x; task < packs * pass.shares.splits; task += gridDim.x) {
    const int64_t split = task / packs, begin = split * pass.shares.per_split;
    const int64_t end = smaller(begin + pass.shares.per_split, units);
    const int pack = static_cast<int>(task - split * packs) * abreast * width<T>;
    const int first = pack + own_segment % abreast * width<T>, rows = smaller(width<T>, half - first);
    T sums[2][width<T>] = {};  // of the scales, of the offsets
    for (int64_t unit = begin + own_segment / abreast * segment + threadIdx.x % segment; rows > 0 && unit < end;
         unit += blockDim.x / abreast) {
      const int64_t n = unit * width<T> / args.positions, p = unit * width<T> - n * args.positions;
      NetPatch<T> value = load_rows<T>(args.in, n, kept + first, p, rows), grad = {};
#pragma unroll
      for (int k = 0; k < width<T>; ++k) {
        const int i = k < rows ? targets[first + k] : static_cast<int>(outside);
        if (i == outside) continue;
        grad.v[k] = load_vector(grad_out.all.data + element_offset(grad_out.all, n, i, p));
        if (i >= grad_out.added_channels) continue;
        const Vec<T> added = load_any<true>(grad_out.added, pass.shares.added_columns,
                                            grad_out.added.data + element_offset(grad_out.added, n, i, p));
#pragma unroll
        for (int l = 0; l < width<T>; ++l) grad.v[k].v[l] += added.v[l];
      }
      NetPatches<T> net = fetch_patches<T>(args.net_out, kind.map, n, first, half, p, pass.wide);
      const T weight = args.grad_log_det[n];
      widen_patches(args.net_out.type, net.shift, net.raw);
#pragma unroll 1
      for (int k = 0; k < width<T>; ++k) {
        Vec<T> y = value.v[0], grad_y, shift = net.shift.v[0], raw = net.raw.v[0];
        T sum_scale = sums[0][0], sum_offset = sums[1][0];
        if (k < rows) {
          const int i = targets[first + k];
          const int64_t j = kept + first + k;
          const T scale = i == outside ? T(NAN) : args.map.scale[i];
          const T center = args.map.center == nullptr ? T(0) : args.map.center[j];
          with_scale_map(kind.map, [&](auto map) {
#pragma unroll
            for (int l = 0; l < width<T>; ++l) {
              const math::Scale<T> s = scale_at<decltype(map)::value>(raw.v[l], kind.params);
              y.v[l] = couple_in(kind.order, y.v[l], shift.v[l], s.s);
              const T of_y = grad.v[0].v[l] * scale;
              const auto grads = couple_backward_in(kind.order, y.v[l], shift.v[l], s.s, of_y, weight);
              grad_y.v[l] = grads.in;
              shift.v[l] = grads.shift;
              raw.v[l] = grads.log_s * s.slope;
              sum_scale += grad.v[0].v[l] * math::centred(y.v[l], center);
              sum_offset += grad.v[0].v[l];
            }
          });
          store_vector(args.grad_in.data + element_offset(args.grad_in, n, j, p), grad_y);
        }
        rotate(value, {});
        rotate(grad, {});
        rotate(net.shift, shift);
        rotate(net.raw, raw);
#pragma unroll
        for (int l = 0; l + 1 < width<T>; ++l) {
          sums[0][l] = sums[0][l + 1];
          sums[1][l] = sums[1][l + 1];
        }
        sums[0][width<T> - 1] = sum_scale;
        sums[1][width<T> - 1] = sum_offset;
      }
      store_patches(args.grad_net_out, kind.map, n, first, half, p, pass.wide, net);
    }
    __syncthreads();  // the sums of an earlier task have been read
#pragma unroll
    for (int k = 0; k < 2 * width<T>; ++k) {
      double sum = sums[k / width<T>][k % width<T>];
#pragma unroll
      for (int offset = segment / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (threadIdx.x % segment == 0) segment_sums[k * segments + own_segment] = sum;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < 2 * width<T> * abreast; e += blockDim.x) {
      const int k = e / abreast, group = e % abreast, c = pack + group * width<T> + k % width<T>;
      if (c >= half || targets[c] == outside) continue;
      double sum = 0;
      for (int s = group; s < segments; s += abreast) sum += segment_sums[k * segments + s];
      pass.shares.partials[(k / width<T> * args.channels + targets[c]) * pass.shares.splits + split] = sum;
    }
  }
}

template <class T>
struct StepPatches {
  StepGatherBackwardArgs<T> args;
  Parts parts;
};

template <class T>
__global__ void __launch_bounds__(block_threads, 2) step_gather_backward_patches_kernel(const StepPatches<T> pass) {
  PYGLOW_DYNAMIC_SHARED(int, targets);
  const StepGatherBackwardArgs<T>& args = pass.args;
  const CouplingKind<T>& kind = args.kind;
  const int half = static_cast<int>(args.transformed);
  const int64_t kept = args.channels - args.transformed;
  find_targets(targets, args.map, args.channels, args.transformed);
  pass.parts.for_each(args.samples, [&](int64_t n, int64_t part, int64_t) {
    const T weight = args.grad_log_det[n];
    for_each_patch<T>(pass.parts.walk, part, args.positions, [&](int first, int64_t p) {
      NetPatch<T> value = load_rows<T>(args.y, n, kept + first, p, half - first);
      NetPatch<T> grad = load_rows<T>(args.grad_y, n, kept + first, p, half - first);
      NetPatches<T> net = fetch_patches<T>(args.net_out, kind.map, n, first, half, p, pass.parts.wide);
      widen_patches(args.net_out.type, net.shift, net.raw);
#pragma unroll 1
      for (int k = 0; k < width<T>; ++k) {
        Vec<T> u = value.v[0], grad_u = grad.v[0], shift = net.shift.v[0], raw = net.raw.v[0];
        if (first + k < half) {
          with_scale_map(kind.map, [&](auto map) {
#pragma unroll
            for (int l = 0; l < width<T>; ++l) {
              const math::Scale<T> s = scale_at<decltype(map)::value>(raw.v[l], kind.params);
              const auto grads = couple_backward_in(kind.order, u.v[l], shift.v[l], s.s, grad_u.v[l], weight);
              u.v[l] = uncouple_in(kind.order, u.v[l], shift.v[l], s.s);
              grad_u.v[l] = grads.in;
              shift.v[l] = grads.shift;
              raw.v[l] = grads.log_s * s.slope;
            }
          });
          const int64_t j = kept + first + k;
          store_vector(args.grad_u.data + element_offset(args.grad_u, n, j, p), grad_u);
          const int i = targets[first + k];
          if (i != outside) {
            const T scale = args.map.scale[i], center = args.map.center == nullptr ? T(0) : args.map.center[j];
#pragma unroll
            for (int l = 0; l < width<T>; ++l) u.v[l] = math::gathered(math::centred(u.v[l], center), scale, T(0));
            store_vector(args.x.data + element_offset(args.x, n, i, p), u);
          }
        }
        rotate(value, {});
        rotate(grad, {});
        rotate(net.shift, shift);
        rotate(net.raw, raw);
      }
      store_patches(args.grad_net_out, kind.map, n, first, half, p, pass.parts.wide, net);
    });
  });
}

int64_t target_bytes(int64_t transformed) { return transformed * static_cast<int64_t>(sizeof(int)); }

}  // namespace

// - Grid: samples by parts of 1024 to 8192 elements, at most max_blocks blocks, which then loop. Each of them first
//   turns the index round, C numbers from the L2.
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor; a thread has twelve 16-byte loads
//   in flight, 98 KB in all, more than bandwidth times latency (about 30 KB).
// - Bound: memory, 4 values moved for each element.
template <class T>
int gather_patches(const GatherArgs<T>& args, bool wide, const Queue& queue) {
  const Parts parts = parts_for<T>(args.samples, args.transformed, args.positions, wide);
  double* const partials = args.log_det == nullptr ? nullptr : partial_sums(args.samples, parts.parts, queue);
  const int64_t blocks = smaller(args.samples * parts.parts, max_blocks);
  const int error = launch(gather_patches_kernel<T>, blocks, walk_threads(parts.walk, parts.walk),
                           target_bytes(args.transformed), queue.stream, GatherPatches<T>{args, parts, partials});
  if (error != cudaSuccess || partials == nullptr) return error;
  return sample_sums<T>(partials, args.samples, parts.parts, 0.0, args.log_det, queue.stream);
}

// - Grid: packs of up to 16 channels (8 in double) by the splits of the kept channels' kernel.
// - Occupancy: as above; a thread has up to twenty 16-byte loads in flight.
// - Bound: memory, 7 values moved for each element.
template <class T>
int gather_backward_patches(const GatherBackwardArgs<T>& args, bool wide, const PatchShares& shares,
                            const Queue& queue) {
  const int64_t packs = divide_up(args.transformed, shares.abreast * width<T>);
  return launch(gather_backward_patches_kernel<T>, smaller(packs * shares.splits, max_blocks), dim3(block_threads),
                target_bytes(args.transformed), queue.stream, BackwardPatches<T>{args, shares, wide});
}

// As gather_patches, but that nothing is summed and 8 values are moved for each element, four more of them loads.
template <class T>
int step_gather_backward_patches(const StepGatherBackwardArgs<T>& args, bool wide, const Queue& queue) {
  const Parts parts = parts_for<T>(args.samples, args.transformed, args.positions, wide);
  const int64_t blocks = smaller(args.samples * parts.parts, max_blocks);
  return launch(step_gather_backward_patches_kernel<T>, blocks, walk_threads(parts.walk, parts.walk),
                target_bytes(args.transformed), queue.stream, StepPatches<T>{args, parts});
}

template int gather_patches<float>(const GatherArgs<float>&, bool, const Queue&);
template int gather_patches<double>(const GatherArgs<double>&, bool, const Queue&);
template int gather_backward_patches<float>(const GatherBackwardArgs<float>&, bool, const PatchShares&, const Queue&);
template int gather_backward_patches<double>(const GatherBackwardArgs<double>&, bool, const PatchShares&, const Queue&);
template int step_gather_backward_patches<float>(const StepGatherBackwardArgs<float>&, bool, const Queue&);
template int step_gather_backward_patches<double>(const StepGatherBackwardArgs<double>&, bool, const Queue&);

}  // namespace pyglow::cuda
