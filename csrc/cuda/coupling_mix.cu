// CUDA schedule of a coupling and a channel mixing in one pass: the coupling is applied while its output is staged for
// the product, and what lies between the two is never written.
#include "cuda/coupled_source.cuh"
#include "cuda/fused_product.cuh"
#include "cuda/sample_sums.cuh"

namespace pyglow::cuda {

// - Grid: as channel_mix. A block walks its range, so that it leaves at most two samples' log_det to the second stage,
//   which is not launched where no sample lies in two ranges.
// - Large C: each group stages, and so couples, again. An element staged costs 128 multiply-adds in its group and,
//   every second one, some 30 instructions of the coupling: about an eighth more. A coupling pass of its own would need
//   memory of the state's size and move 2 C values more for each position. Of small products that fused_cut splits, an
//   element costs 32 multiply-adds or more in each group, and the instructions are spread over idle multiprocessors.
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor (4 of 128; double: 1); at most 47 KB
//   of shared memory, which is not the tighter limit. While a thread couples one row it loads the next, so that three
//   to six 16-byte loads are in flight, 24 to 48 KB on a multiprocessor; bandwidth times latency is about 30 KB.
// - Bound: memory up to about C = 64 (3 C values moved for C^2 multiply-adds), then the multiply-add units.
template <class T>
int coupling_mix(const CouplingMixArgs<T>& args, const Queue& queue) {
  const CouplingArgs<T>& half = args.coupling;
  const int64_t samples = half.samples, channels = half.channels, positions = half.positions;
  if (samples * positions == 0 || channels == 0) return no_sums(samples, half.log_det, queue.stream);
  const bool inverse = half.kind.inverse;
  const CoupledSource<T> source = coupled_source(half.in, half.net_out, inverse ? args.offset : nullptr, channels,
                                                 half.transformed, positions, half.kind);
  const auto sink = plain_sink(half.out, channels);
  const bool vector = has_vector_columns(source, positions) && has_vector_columns(read_only(half.out), positions);
  const int64_t partials_bytes = 2 * static_cast<int64_t>(sizeof(double)) * most_ranges<T>(samples, positions);
  double* const partials = static_cast<double*>(queue.scratch(partials_bytes));
  const LogDet<T> log_det = {half.log_det, partials, inverse};
  return fused_product<T>(source, sink, args.matrix, channels, 1, inverse ? nullptr : args.offset, samples, channels,
                          positions, vector, log_det, queue.stream);
}

PYGLOW_CUDA_INSTANTIATE(coupling_mix, CouplingMixArgs)

}  // namespace pyglow::cuda
