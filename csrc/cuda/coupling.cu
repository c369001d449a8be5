// CUDA schedule of the coupling, forward and inverse: one pass over memory, and log_det summed in two stages without
// atomics, so that two runs give the same bits.
#include "core.h"
#include "cuda/coupling_kind.cuh"
#include "cuda/rows.cuh"
#include "cuda/sample_sums.cuh"
#include "math/coupling.h"

namespace pyglow::cuda {
namespace {

template <class T>
struct Coupling {
  RowView<const T> in, kept_in;
  NetView<const void> shift, raw;
  RowView<T> out, kept_out;
  Walk walk, kept_walk;
  T* log_det;        // (N,)
  double* partials;  // (N, parts), if there are several parts
  int64_t samples, parts;
  bool copy_kept;
  ScaleParams<T> params;
};

// One value; returns log s.
template <class K, class T>
__device__ __forceinline__ T couple_one(T& value, T shift, T raw, const ScaleParams<T>& params) {
  math::Scale<T> scale = {T(1), T(0), T(0)};
  if constexpr (K::affine) scale = math::scale_of<K::map>(raw, params);
  value = K::inverse ? math::uncouple<K::order>(value, shift, scale.s) : math::couple<K::order>(value, shift, scale.s);
  return scale.log_s;
}

// A block couples parts of samples, one after another; a thread adds up its log s in T, the block in double.
template <class T, class K, bool Vector>
__global__ void __launch_bounds__(block_threads, sizeof(T) == 4             ? 4
                                                 : K::map == ScaleMap::atan ? 1
                                                                            : 2) coupling_kernel(const Coupling<T> c) {
  constexpr int unit = unit_width<T, Vector>;
  for (int64_t task = blockIdx.x; task < c.samples * c.parts; task += gridDim.x) {
    const int64_t n = task / c.parts, part = task - n * c.parts;
    T log_s = T(0);
    for_each_unit<unit>(c.walk, part, [&](int64_t row, int64_t i) {
      Unit<T, Vector> value = load_unit<Vector>(c.in, n, row, i);
      Unit<T, Vector> shift = fetch_unit<T, Vector>(c.shift, n, row, i), raw = {};
      if constexpr (K::affine) raw = fetch_unit<T, Vector>(c.raw, n, row, i);
      widen_net(c.shift.type, shift, raw);
#pragma unroll
      for (int k = 0; k < unit; ++k) log_s += couple_one<K>(value.v[k], shift.v[k], raw.v[k], c.params);
      store_unit<Vector>(c.out, n, row, i, value);
    });
    if (c.copy_kept)
      for_each_unit<unit>(c.kept_walk, part, [&](int64_t row, int64_t i) {
        store_unit<Vector>(c.kept_out, n, row, i, load_unit<Vector>(c.kept_in, n, row, i));
      });
    if constexpr (K::affine) {
      const double sum = block_sum(K::inverse ? -static_cast<double>(log_s) : static_cast<double>(log_s));
      if (threadIdx.x == 0) {
        if (c.parts == 1) {
          c.log_det[n] = static_cast<T>(sum);
        } else {
          c.partials[task] = sum;
        }
      }
    } else if (part == 0 && threadIdx.x == 0) {
      c.log_det[n] = T(0);
    }
  }
}

}  // namespace

// - Grid: samples by parts of 1024 to 8192 elements, at most max_blocks blocks, which then loop.
// - Occupancy: up to 64 registers (float), so 4 blocks of 256 threads on a multiprocessor; each thread has three
//   16-byte loads in flight, 48 KB in all, more than bandwidth times latency (about 30 KB). Double: 2, with atan 1.
// - Bound: memory; the scale map takes 50 to 100 instructions for each 16 bytes moved. The kept channels are copied in
//   the same pass, and not at all if out is in. The second stage: sample_sums.cuh.
template <class T>
int coupling(const CouplingArgs<T>& args, const Queue& queue) {
  if (args.samples == 0) return cudaSuccess;
  const int64_t transformed = args.transformed, kept = args.channels - transformed, positions = args.positions;
  const Rows rows = rows_of(positions, args.out, args.in, args.net_out);
  const int64_t parts = parts_of(args.samples, transformed * positions);
  const Strided<const T> out = read_only(args.out);
  const bool same = out.data == args.in.data && out.sample == args.in.sample && out.channel == args.in.channel &&
                    out.position == args.in.position;
  Coupling<T> c = {};
  c.in = row_view(args.in, rows, kept);
  c.shift = net_rows<T>(args.net_out, rows, 0);
  c.raw = net_rows<T>(args.net_out, rows, args.kind.map == ScaleMap::none ? 0 : transformed);
  c.out = row_view(args.out, rows, kept);
  c.kept_in = row_view(args.in, rows, 0);
  c.kept_out = row_view(args.out, rows, 0);
  c.log_det = args.log_det;
  c.partials = partial_sums(args.samples, parts, queue);
  c.samples = args.samples;
  c.parts = parts;
  c.copy_kept = !same;
  c.params = args.kind.params;
  const bool vector =
      row_length(rows, transformed, positions) % width<T> == 0 && row_length(rows, kept, positions) % width<T> == 0 &&
      has_vector_rows(c.in, rows) && has_vector_rows<T>(c.shift, rows) && has_vector_rows<T>(c.raw, rows) &&
      has_vector_rows(c.out, rows) && has_vector_rows(c.kept_in, rows) && has_vector_rows(c.kept_out, rows);
  const int unit = vector ? width<T> : 1;
  c.walk = walk_of(rows, transformed, positions, parts, unit);
  c.kept_walk = walk_of(rows, kept, positions, parts, unit);
  const dim3 threads = walk_threads(c.walk, c.kept_walk);
  const int64_t blocks = smaller(args.samples * parts, max_blocks);
  const int error = with_kind(args.kind, [&](auto kind) {
    using K = decltype(kind);
    return vector ? launch(coupling_kernel<T, K, true>, blocks, threads, 0, queue.stream, c)
                  : launch(coupling_kernel<T, K, false>, blocks, threads, 0, queue.stream, c);
  });
  if (error != cudaSuccess || parts == 1 || args.kind.map == ScaleMap::none) return error;
  return sample_sums<T>(c.partials, args.samples, parts, 0.0, args.log_det, queue.stream);
}

PYGLOW_CUDA_INSTANTIATE(coupling, CouplingArgs)

}  // namespace pyglow::cuda
