// The net's output, and the gradient for it, where their channels are neighbours in memory (channels-last, as tensor
// cores like it) and the positions of the flow state are.
//
// A thread takes a patch, `width` channels by `width` positions: it reads 16 bytes of channels at each position, and 16
// bytes of positions in each channel of the state. Turning one into the other is only a matter of which register is
// called what, so that nothing goes through shared memory. 16-bit numbers are 8 bytes where those of T are 16.
//
// The channels of both halves of the output, shift and raw, come in pairs, but not always in fours (C2 = 6: raw begins
// at the sixth channel): a patch of floats that does not begin at a multiple of four, or reaches beyond its half, is
// read as pairs.
#pragma once
#include "cuda/net_data.cuh"

namespace pyglow::cuda {

// Channel k at position i of the patch is v[k].v[i]. Count: `width`, or two for a thread that has no more channels.
template <class T, int Count = width<T>>
struct NetPatch {
  Vec<T> v[Count];
};

// How a launch reaches the net's tensors: in the strided path, in vectors of positions, or in patches. wide: multiples
// of `width` channels are aligned.
struct NetAccess {
  enum class Path { strided, positions, patches } path;
  bool wide;

  bool vector() const { return path != Path::strided; }
  bool patches() const { return path == Path::patches; }
};

template <class T, class Data>
bool has_net_vectors(const NetTensor<Data>& x, int64_t channels) {
  return x.channel == 1 && x.position % channels == 0 && x.sample % channels == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % (channels * net_bytes<T>(x.type)) == 0;
}

// Of tensors that belong to a state with vectors of positions.
template <class T, class... Data>
NetAccess net_access(int64_t kept, int64_t transformed, int64_t positions, const NetTensor<Data>&... nets) {
  if ((has_vector_net<T>(nets, positions) && ...)) return {NetAccess::Path::positions, false};
  if (kept % 2 != 0 || transformed % 2 != 0 || !(has_net_vectors<T>(nets, 2) && ...))
    return {NetAccess::Path::strided, false};
  return {NetAccess::Path::patches, (has_net_vectors<T>(nets, width<T>) && ...)};
}

// Calls f(std::bool_constant<whether the net's tensors are taken in patches>()).
template <class F>
int with_patches(const NetAccess& access, const F& f) {
  return access.patches() ? f(std::true_type()) : f(std::false_type());
}

// The patch that begins at channel c of a half, where c may be negative: which of its pairs lie in the half, and
// whether all of it is one vector at each position.
template <class T, int Count = width<T>>
struct NetPart {
  static constexpr int pairs = Count / 2;
  int channel;  // in the tensor
  bool there[pairs];
  bool whole;
};

template <class T, int Count = width<T>>
__device__ __forceinline__ NetPart<T, Count> net_part(int c, int half, int transformed, bool wide) {
  NetPart<T, Count> part = {half + c, {}, wide && Count == width<T> && (half + c) % width<T> == 0};
#pragma unroll
  for (int m = 0; m < NetPart<T, Count>::pairs; ++m) {
    part.there[m] = c + 2 * m >= 0 && c + 2 * m < transformed;
    part.whole = part.whole && part.there[m];
  }
  return part;
}

// The patch of the positions whose first one is at offset `at`, as fetch_net gives it: 16-bit numbers stand as bits in
// the first two vectors, to be widened after the loads of other tensors have been issued too. Zero where nothing is.
template <class T, int Count>
__device__ __forceinline__ NetPatch<T, Count> fetch_patch(const NetOutput& x, int64_t at,
                                                          const NetPart<T, Count>& part) {
  constexpr int positions = width<T>;
  NetPatch<T, Count> patch = {};
  const int64_t start = at + part.channel;
  const auto pairs = [&](auto* data, const auto& load) {
#pragma unroll
    for (int m = 0; m < NetPart<T, Count>::pairs; ++m) {
      if (!part.there[m]) continue;
      auto* p = data + start + 2 * m;
#pragma unroll
      for (int i = 0; i < positions; ++i, p += x.position) load(m, i, p);
    }
  };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (x.type != NetType::state) {
      const uint16_t* p = static_cast<const uint16_t*>(x.data);
      if (!part.whole) {
        pairs(p, [&](int m, int i, const uint16_t* pair) {
          patch.v[m].v[i] = math::float_of(*static_cast<const uint32_t*>(__builtin_assume_aligned(pair, 4)));
        });
        return patch;
      }
      p += start;
#pragma unroll
      for (int i = 0; i < positions; ++i, p += x.position) {
        const Bits64 bits = *static_cast<const Bits64*>(__builtin_assume_aligned(p, 8));
        patch.v[0].v[i] = math::float_of(bits.low);
        patch.v[NetPart<T, Count>::pairs - 1].v[i] = math::float_of(bits.high);
      }
      return patch;
    }
  }
  const T* p = static_cast<const T*>(x.data);
  if (part.whole) {
    p += start;
#pragma unroll
    for (int i = 0; i < positions; ++i, p += x.position) {
      const Vec<T> channels = load_vector(p);
#pragma unroll
      for (int k = 0; k < Count; ++k) patch.v[k].v[i] = channels.v[k];
    }
  } else if constexpr (sizeof(T) == sizeof(float)) {
    pairs(p, [&](int m, int i, const T* pair) {
      const Bits64 bits = *static_cast<const Bits64*>(__builtin_assume_aligned(pair, 8));
      patch.v[2 * m].v[i] = math::float_of(bits.low);
      patch.v[2 * m + 1].v[i] = math::float_of(bits.high);
    });
  }
  return patch;
}

// The numbers of patches that fetch_patch gave.
template <class Half, class T, int Count>
__device__ __forceinline__ void widen_patch(NetPatch<T, Count>& patch) {
#pragma unroll
  for (int i = 0; i < width<T>; ++i) {
    T channels[] = {patch.v[0].v[i], patch.v[1].v[i], T(0), T(0)};
    widen_bits<Half>(channels);
#pragma unroll
    for (int k = 0; k < Count; ++k) patch.v[k].v[i] = channels[k];
  }
}
template <class T, int Count, class... More>
__device__ __forceinline__ void widen_patches(NetType type, NetPatch<T, Count>& patch, More&... more) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (type == NetType::bfloat16) {
      widen_patch<BFloat16>(patch);
      (widen_patch<BFloat16>(more), ...);
    } else if (type == NetType::float16) {
      widen_patch<Float16>(patch);
      (widen_patch<Float16>(more), ...);
    }
  }
}

// The reverse of fetch_patch and widen_patches.
template <class T, int Count>
__device__ __forceinline__ void store_patch(const NetGrad& x, int64_t at, const NetPart<T, Count>& part,
                                            const NetPatch<T, Count>& patch) {
  constexpr int positions = width<T>;
  const auto place = [&](int i) { return at + i * x.position + part.channel; };
  if constexpr (sizeof(T) == sizeof(float)) {
    if (x.type != NetType::state) {
#pragma unroll
      for (int i = 0; i < positions; ++i) {
        uint16_t* const p = static_cast<uint16_t*>(x.data) + place(i);
        uint32_t bits[NetPart<T, Count>::pairs];
#pragma unroll
        for (int m = 0; m < NetPart<T, Count>::pairs; ++m)
          bits[m] = narrow_bits(patch.v[2 * m].v[i], x.type) | narrow_bits(patch.v[2 * m + 1].v[i], x.type) << 16;
        if (part.whole) {
          store_whole(reinterpret_cast<uint2*>(p), make_uint2(bits[0], bits[NetPart<T, Count>::pairs - 1]));
        } else {
#pragma unroll
          for (int m = 0; m < NetPart<T, Count>::pairs; ++m)
            if (part.there[m]) *static_cast<uint32_t*>(__builtin_assume_aligned(p + 2 * m, 4)) = bits[m];
        }
      }
      return;
    }
    if (!part.whole) {
#pragma unroll
      for (int m = 0; m < NetPart<T, Count>::pairs; ++m) {
        if (!part.there[m]) continue;
#pragma unroll
        for (int i = 0; i < positions; ++i)
          store_whole(reinterpret_cast<uint2*>(static_cast<float*>(x.data) + place(i) + 2 * m),
                      make_uint2(math::float_bits(patch.v[2 * m].v[i]), math::float_bits(patch.v[2 * m + 1].v[i])));
      }
      return;
    }
  }
  if (!part.whole) return;
#pragma unroll
  for (int i = 0; i < positions; ++i) {
    Vec<T> channels;
#pragma unroll
    for (int k = 0; k < Count; ++k) channels.v[k] = patch.v[k].v[i];
    store_vector(static_cast<T*>(x.data) + place(i), channels);
  }
}

// Moves the channels of a patch up by one and puts `last`, what the first has become, behind them. After as many calls
// as there are channels each is in its place again, so that the code that treats one channel is there once.
template <class T, int Count>
__device__ __forceinline__ void rotate(NetPatch<T, Count>& patch, const Vec<T>& last) {
#pragma unroll
  for (int k = 0; k + 1 < Count; ++k) patch.v[k] = patch.v[k + 1];
  patch.v[Count - 1] = last;
}

}  // namespace pyglow::cuda
