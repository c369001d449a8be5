// CUDA schedule of the channel mixing: a product between a plain source and a plain sink.
#include "core.h"
#include "cuda/fused_product.cuh"

namespace pyglow::cuda {

// - Grid: ranges of tiles of 16 to 64 16-byte columns by groups of up to 128 output channels, groups fastest, so that
//   the second reader of a tile finds it in L2; at most max_blocks. Tiles of 4 columns up and groups of 16 output
//   channels up where that would leave half of a large GPU idle (fused_cut).
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor (4 of 128), in double half of that;
//   at most 47 KB of shared memory, which is not the tighter limit. A thread has four 16-byte loads in flight while it
//   stages, 32 KB on a multiprocessor, about bandwidth times latency; the weights of a chunk come meanwhile, all at
//   once, by copies to shared memory.
// - Bound: memory up to about C = 64 (C / 8 multiply-adds for each byte moved), then the multiply-add units. x is read
//   once up to C = 128 and ceil(C / 128) times above, mostly from L2. Squeezing changes addresses only: a thread reads
//   or writes 32 bytes of an image's row for two channels.
template <class T>
int channel_mix(const ChannelMixArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (samples * positions == 0 || channels == 0) return cudaSuccess;
  const T* const center = args.subtract_first ? args.offset : nullptr;
  const T* const offset = args.subtract_first ? nullptr : args.offset;
  const PlainSource<T> source = plain_source(args.x, center, positions);
  const bool vector = has_vector_columns(args.x, positions) && has_vector_columns(read_only(args.u), positions);
  return fused_product<T>(source, plain_sink(args.u, channels), args.matrix, channels, 1, offset, samples, channels,
                          positions, vector, LogDet<T>{}, queue.stream);
}

PYGLOW_CUDA_INSTANTIATE(channel_mix, ChannelMixArgs)

}  // namespace pyglow::cuda
