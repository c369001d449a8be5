// What the kernels of the channel mixing by a permutation share: where an element lies, and which channel one comes
// from.
#pragma once
#include "cuda/coupling_kind.cuh"
#include "cuda/net_data.cuh"
#include "cuda/tile.cuh"
#include "math/channel_mix.h"

namespace pyglow::cuda {

// The offset of position p of channel c of sample n.
template <class T>
__device__ __forceinline__ int64_t element_offset(const Strided<T>& x, int64_t n, int64_t c, int64_t p) {
  return n * x.sample + c * x.channel + p * x.position;
}
template <class T>
__device__ __forceinline__ int64_t element_offset(const Squeezed<T>& x, int64_t n, int64_t c, int64_t p) {
  if (x.width == 0) return element_offset(static_cast<const Strided<T>&>(x), n, c, p);
  const int64_t h = p / x.width, w = p - h * x.width;
  return n * x.sample + channel_offset(x, c) + 2 * (h * x.row + w * x.position);
}
template <class Data>
__device__ __forceinline__ int64_t element_offset(const NetTensor<Data>& x, int64_t n, int64_t c, int64_t p) {
  return n * x.sample + c * x.channel + p * x.position;
}

// The channel that channel i comes from; `outside` where the index names none, which the host has not seen: its memory
// is not read, and NaN shows.
template <class T>
__device__ __forceinline__ int64_t source_channel(const Gather<T>& map, int64_t i, int64_t channels) {
  const int64_t j = map.index[i];
  return j >= 0 && j < channels ? j : outside;
}

// The net's output for a transformed channel.
template <class T, bool Vector>
struct NetUnits {
  Unit<T, Vector> shift, raw;
};
template <bool Vector, class T>
__device__ __forceinline__ NetUnits<T, Vector> fetch_net_units(const NetOutput& net_out, ScaleMap map, int64_t n,
                                                               int64_t c, int64_t transformed, int64_t p) {
  NetUnits<T, Vector> units = {};
  const int64_t at = element_offset(net_out, n, c, p);
  units.shift = fetch_net<T, Vector>(net_out.data, net_out.type, at);
  if (map != ScaleMap::none)
    units.raw = fetch_net<T, Vector>(net_out.data, net_out.type, at + transformed * net_out.channel);
  return units;
}
template <bool Vector, class T>
__device__ __forceinline__ void store_net_units(const NetGrad& grad, ScaleMap map, int64_t n, int64_t c,
                                                int64_t transformed, int64_t p, const NetUnits<T, Vector>& units) {
  const int64_t at = element_offset(grad, n, c, p);
  store_net<Vector>(grad.data, grad.type, at, units.shift);
  if (map != ScaleMap::none) store_net<Vector>(grad.data, grad.type, at + transformed * grad.channel, units.raw);
}

// Whether units of `width` positions are 16 bytes of a row; of no squeezed one, whose neighbours in memory belong to
// two channels.
template <class T>
bool has_vector_units(const Squeezed<const T>& x, int64_t positions) {
  return x.width == 0 && has_vector_columns(static_cast<const Strided<const T>&>(x), positions);
}

}  // namespace pyglow::cuda
