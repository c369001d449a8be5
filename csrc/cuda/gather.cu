// CUDA schedule of the channel mixing by a permutation, with a coupling in the same pass or without: one pass over
// memory, and log_det summed in two stages without atomics, so that two runs give the same bits.
#include <cmath>

#include "cuda/gather.cuh"
#include "cuda/log_det.cuh"
#include "cuda/rows.cuh"
#include "cuda/sample_sums.cuh"

namespace pyglow::cuda {
namespace {

template <class T>
struct GatherPass {
  GatherArgs<T> args;
  Walk walk;
  double* partials;  // (N, parts), if there are several parts
  int64_t parts;
  bool by_positions;  // a row of the walk is a position, and not a channel
};

// y of channel j, coupled if it is transformed; adds log s.
template <bool Vector, class T>
__device__ __forceinline__ Unit<T, Vector> coupled_unit(const GatherArgs<T>& args, int64_t n, int64_t j, int64_t p,
                                                        T& log_s) {
  Unit<T, Vector> value = load_unit<Vector>(args.in.data + element_offset(args.in, n, j, p));
  const int64_t c = j - (args.channels - args.transformed);
  if (c < 0) return value;
  auto net = fetch_net_units<Vector, T>(args.net_out, args.kind.map, n, c, args.transformed, p);
  widen_net(args.net_out.type, net.shift, net.raw);
  with_scale_map(args.kind.map, [&](auto map) {
#pragma unroll
    for (int k = 0; k < unit_width<T, Vector>; ++k) {
      const math::Scale<T> scale = scale_at<decltype(map)::value>(net.raw.v[k], args.kind.params);
      value.v[k] = args.kind.inverse ? uncouple_in(args.kind.order, value.v[k], net.shift.v[k], scale.s)
                                     : couple_in(args.kind.order, value.v[k], net.shift.v[k], scale.s);
      log_s += scale.log_s;
    }
  });
  return value;
}

// A block takes parts of samples, one after another; a thread adds up its log s in T, the block in double.
template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4 ? 4 : 3) gather_kernel(const GatherPass<T> pass) {
  const GatherArgs<T>& args = pass.args;
  const Gather<T>& map = args.map;
  for (int64_t task = blockIdx.x; task < args.samples * pass.parts; task += gridDim.x) {
    const int64_t n = task / pass.parts, part = task - n * pass.parts;
    T log_s = T(0);
    for_each_unit<unit_width<T, Vector>>(pass.walk, part, [&](int64_t row, int64_t at) {
      const int64_t i = pass.by_positions ? at : row, p = pass.by_positions ? row : at;
      const int64_t j = source_channel(map, i, args.channels);
      Unit<T, Vector> value = {};
      T scale = T(NAN), center = T(0);
      if (j != outside) {
        value = coupled_unit<Vector>(args, n, j, p, log_s);
        scale = map.scale[i];
        if (map.center != nullptr) center = map.center[j];
      }
      const T offset = map.offset == nullptr ? T(0) : map.offset[i];
#pragma unroll
      for (int k = 0; k < unit_width<T, Vector>; ++k)
        value.v[k] = math::gathered(math::centred(value.v[k], center), scale, offset);
      store_unit<Vector>(args.out.data + element_offset(args.out, n, i, p), value);
    });
    if (args.log_det == nullptr) continue;
    const double sum = block_sum(args.kind.inverse ? -static_cast<double>(log_s) : static_cast<double>(log_s));
    if (threadIdx.x != 0) continue;
    if (pass.parts == 1) {
      args.log_det[n] = static_cast<T>(sum);
    } else {
      pass.partials[task] = sum;
    }
  }
}

}  // namespace

// - Grid: samples by parts of 1024 to 8192 elements, at most max_blocks blocks, which then loop.
// - Occupancy: up to 64 registers (float), so 4 blocks of 256 threads on a multiprocessor; a thread has up to three
//   16-byte loads in flight, 48 KB in all, more than bandwidth times latency (about 30 KB). Double: 3.
// - Bound: memory, 2 values moved for a kept element and 4 for a transformed one. Where channels are neighbours in
//   memory a thread takes single elements: those of a position come from the same few lines.
template <class T>
int gather(const GatherArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (samples * positions == 0 || channels == 0)
    return args.log_det == nullptr ? cudaSuccess : no_sums(samples, args.log_det, queue.stream);
  const Squeezed<const T> out = read_only(args.out);
  GatherPass<T> pass = {};
  pass.args = args;
  pass.by_positions = channels_adjacent(out, positions);
  pass.parts = parts_of(samples, channels * positions);
  const bool vector = !pass.by_positions && has_vector_units(args.in, positions) && has_vector_units(out, positions) &&
                      (args.transformed == 0 || has_vector_net<T>(args.net_out, positions));
  pass.partials = args.log_det == nullptr ? nullptr : partial_sums(samples, pass.parts, queue);
  const Rows rows = pass.by_positions ? Rows::positions : Rows::channels;
  pass.walk = walk_of(rows, channels, positions, pass.parts, vector ? width<T> : 1);
  const dim3 threads = walk_threads(pass.walk, pass.walk);
  const int64_t blocks = smaller(samples * pass.parts, max_blocks);
  const int error = vector ? launch(gather_kernel<T, true>, blocks, threads, 0, queue.stream, pass)
                           : launch(gather_kernel<T, false>, blocks, threads, 0, queue.stream, pass);
  if (error != cudaSuccess || pass.partials == nullptr) return error;
  return sample_sums<T>(pass.partials, samples, pass.parts, 0.0, args.log_det, queue.stream);
}

PYGLOW_CUDA_INSTANTIATE(gather, GatherArgs)

}  // namespace pyglow::cuda
