// CUDA schedule of the channel mixing's gradients: grad_x is a product like the forward one, grad_M and grad_c are sums
// over all positions.
#include "core.h"
#include "cuda/fused_product.cuh"
#include "cuda/mix_sums.cuh"

namespace pyglow::cuda {

// The grids of the product and of the sums: channel_mix.cu, mix_sums.cuh. Both read grad_u and what is added to it:
// writing their sum would cost more.
template <class T>
int channel_mix_backward(const ChannelMixBackwardArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (channels == 0) return cudaSuccess;
  const PlainSource<T> x = plain_source(args.x, args.center, positions);
  const SplitSource<T> grad_u = split_source(args.grad_u, positions);
  const bool vector_grad = has_vector_columns(grad_u, positions);
  if (samples * positions > 0) {
    const bool vector = vector_grad && has_vector_columns(read_only(args.grad_x), positions);
    const int error = fused_product<T>(grad_u, plain_sink(args.grad_x, channels), args.matrix, 1, channels, nullptr,
                                       samples, channels, positions, vector, LogDet<T>{}, queue.stream);
    if (error != cudaSuccess) return error;
  }
  return mix_sums<T>(x, grad_u, args.grad_matrix, args.grad_offset, samples, channels, positions,
                     vector_grad && has_vector_columns(x, positions), queue);
}

PYGLOW_CUDA_INSTANTIATE(channel_mix_backward, ChannelMixBackwardArgs)

}  // namespace pyglow::cuda
