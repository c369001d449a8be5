// CUDA schedule of the channel mixing: a matrix product whose columns are the positions of all samples.
#include "core.h"
#include "cuda/mix_product.cuh"
#include "cuda/tile.cuh"

namespace pyglow::cuda {
namespace {

constexpr int thread_rows = 8;               // output channels of a thread, by `width` positions
constexpr int max_group = 16 * thread_rows;  // output channels of a block
constexpr int max_chunk = 32;                // input channels in shared memory at a time
constexpr int min_blocks = 2 * 132;          // blocks that occupy a large GPU

// How the product is cut: `groups` of output channels by tiles of positions, `chunks` of input channels one after
// another.
struct Cut {
  int group, groups, chunk;
  int64_t tiles;
};

template <class T>
struct Product {
  MixProduct<T> args;
  TileSource<const T> x;
  Cut cut;
  bool vector_channels;  // the strided path may store `width` channels at once
};

template <class T, bool Vector>
PYGLOW_HD constexpr int input_stride(int columns) {
  return Vector ? columns : columns + 1;  // + 1: threads that fill a column hit different banks
}
template <class T>
PYGLOW_HD constexpr int weight_stride(int group) {
  return group + width<T>;  // threads that fill 8 inputs by 4 outputs hit different banks, and rows stay aligned
}

// weights[k * stride + o] = M[out + o, in + k], zero outside M.
template <class T>
__device__ __forceinline__ void stage_weights(T* weights, const Product<T>& p, int64_t out, int64_t in, int inputs) {
  const int group = p.cut.group, stride = weight_stride<T>(group),
            count = group / 4 * static_cast<int>(round_up(inputs, 8)) * 4;
  for (int e = thread_index(); e < count; e += blockDim.x * blockDim.y) {
    const int block = e / 32, k = block / (group / 4) * 8 + e % 8, o = block % (group / 4) * 4 + e / 8 % 4;
    if (k < inputs)
      weights[k * stride + o] =
          out + o < p.args.channels ? p.args.matrix[(out + o) * p.args.row + (in + k) * p.args.column] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void store_strided(const Product<T>& p, const T (&sum)[thread_rows][width<T>], int64_t out,
                                              const int64_t* offsets) {
  const Strided<T>& u = p.args.u;
#pragma unroll
  for (int i = 0; i < width<T>; ++i) {
    const int64_t offset = offsets[threadIdx.x + i * blockDim.x];
    if (offset == outside) continue;
    T* const target = u.data + offset + out * u.channel;
    if (p.vector_channels) {
#pragma unroll
      for (int k = 0; k < thread_rows; k += width<T>) {
        if (out + k >= p.args.channels) break;
        Vec<T> vector;
#pragma unroll
        for (int l = 0; l < width<T>; ++l) vector.v[l] = sum[k + l][i];
        store_vector(target + k, vector);
      }
    } else {
#pragma unroll
      for (int k = 0; k < thread_rows; ++k)
        if (out + k < p.args.channels) target[k * u.channel] = sum[k][i];
    }
  }
}

// Each thread keeps 8 output channels by 16 bytes of positions in registers; a step of the inner loop reads 16 bytes of
// x and 8 weights, which the threads of a warp share, from shared memory for 8 * width multiply-adds. Each chunk has
// sums of its own, so that rounding errors do not pile up over all of C.
template <class T, bool Vector>
__global__ void __launch_bounds__(block_threads, 2) product_kernel(const Product<T> p) {
  const int columns = blockDim.x * width<T>, stride = input_stride<T, Vector>(columns);
  const int group = p.cut.group, chunk = p.cut.chunk;
  const int64_t channels = p.args.channels;
  PYGLOW_DYNAMIC_SHARED(T, weights);
  T* const inputs = weights + chunk * weight_stride<T>(group);
  // Behind an even number of 16-byte units.
  int64_t* const x_offsets = reinterpret_cast<int64_t*>(inputs + round_up(chunk * stride, width<T>));
  int64_t* const u_offsets = x_offsets + columns;
  // A matrix that fits is read once for all tiles of a block.
  const bool resident = p.cut.groups == 1 && chunk >= channels;
  bool loaded = false;

  for (int64_t task = blockIdx.x; task < p.cut.tiles * p.cut.groups; task += gridDim.x) {
    const int64_t tile = task / p.cut.groups, first_out = (task - tile * p.cut.groups) * group;
    const int64_t begin = tile * columns, out = first_out + threadIdx.y * thread_rows;
    const int64_t own = begin + threadIdx.x * width<T>;  // the vector path's position
    int64_t x_own = outside;
    if constexpr (Vector) {
      x_own = offset_of(p.args.x, own, p.args.samples, p.args.positions);
    } else {
      __syncthreads();  // the offsets of the previous tile have been used
      fill_offsets(x_offsets, columns, p.args.x, begin, p.args.samples, p.args.positions);
      fill_offsets(u_offsets, columns, p.args.u, begin, p.args.samples, p.args.positions);
    }
    T total[thread_rows][width<T>];
#pragma unroll
    for (int k = 0; k < thread_rows; ++k) {
      const T start = p.args.offset != nullptr && out + k < channels ? p.args.offset[out + k] : T(0);
#pragma unroll
      for (int i = 0; i < width<T>; ++i) total[k][i] = start;
    }
    for (int64_t in = 0; in < channels; in += chunk) {
      const int count = static_cast<int>(smaller<int64_t>(chunk, channels - in));
      __syncthreads();  // the previous chunk has been used, the offsets are there
      if (!loaded) stage_weights(weights, p, first_out, in, count);
      stage<Vector>(inputs, stride, count, columns, p.x, in, channels, p.args.center, x_own, x_offsets);
      __syncthreads();
      T sum[thread_rows][width<T>] = {};
#pragma unroll 2
      for (int k = 0; k < count; ++k) {
        Vec<T> x;
        if constexpr (Vector) {
          x = load_vector(inputs + k * stride + threadIdx.x * width<T>);
        } else {
#pragma unroll
          for (int i = 0; i < width<T>; ++i) x.v[i] = inputs[k * stride + threadIdx.x + i * blockDim.x];
        }
        const T* const row = weights + k * weight_stride<T>(group) + threadIdx.y * thread_rows;
#pragma unroll
        for (int o = 0; o < thread_rows; o += width<T>) {
          const Vec<T> weight = load_vector(row + o);
#pragma unroll
          for (int l = 0; l < width<T>; ++l)
#pragma unroll
            for (int i = 0; i < width<T>; ++i) sum[o + l][i] = math::mix_term(sum[o + l][i], weight.v[l], x.v[i]);
        }
      }
#pragma unroll
      for (int k = 0; k < thread_rows; ++k)
#pragma unroll
        for (int i = 0; i < width<T>; ++i) total[k][i] += sum[k][i];
    }
    loaded = resident;
    if constexpr (Vector) {
      if (x_own == outside) continue;
      const int64_t u_own = offset_of(p.args.u, own, p.args.samples, p.args.positions);
#pragma unroll
      for (int k = 0; k < thread_rows; ++k) {
        Vec<T> vector;
#pragma unroll
        for (int i = 0; i < width<T>; ++i) vector.v[i] = total[k][i];
        if (out + k < channels) store_vector(p.args.u.data + u_own + (out + k) * p.args.u.channel, vector);
      }
    } else {
      store_strided(p, total, out, u_offsets);
    }
  }
}

template <class T, bool Vector>
int64_t shared_bytes(const Cut& cut, int columns) {
  const int64_t elements =
      cut.chunk * weight_stride<T>(cut.group) + round_up(cut.chunk * input_stride<T, Vector>(columns), width<T>);
  return elements * static_cast<int64_t>(sizeof(T)) +
         (Vector ? 0 : 2 * columns * static_cast<int64_t>(sizeof(int64_t)));
}

}  // namespace

// - Grid: tiles of 16 to 128 16-byte columns by groups of up to 128 output channels, groups fastest so that the tile's
//   second reader finds it in L2; at most max_blocks, which then loop. Wide tiles for few channels keep blocks at 64 to
//   256 threads; tiles shrink while there are fewer blocks than a large GPU runs at once.
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor (4 of 128); at most 43 KB of shared
//   memory, which is not the tighter limit. All of a chunk's loads are in flight together, up to 32 KB a block.
// - Bound: memory up to about C = 64 (C / 8 multiply-adds for each byte moved), then the multiply-add units. x is read
//   once up to C = 128 and ceil(C / 128) times above, mostly from L2.
template <class T>
int mix_product(const MixProduct<T>& args, void* stream) {
  const int64_t total = args.samples * args.positions, channels = args.channels;
  if (total == 0 || channels == 0) return cudaSuccess;
  const int64_t thread_groups = divide_up(channels, thread_rows);
  Cut cut = {};
  int group_limit = smaller(max_group / thread_rows, block_threads / 16);
  cut.groups = static_cast<int>(divide_up(thread_groups, group_limit));
  const int y = static_cast<int>(divide_up(thread_groups, cut.groups));
  cut.group = y * thread_rows;
  cut.chunk = static_cast<int>(smaller<int64_t>(max_chunk, channels));
  int x = 128;
  const auto tiles = [&] { return divide_up(total, x * width<T>); };
  while (x > 16 && (x * y > block_threads || (x * y > 64 && tiles() * cut.groups < min_blocks))) x /= 2;
  cut.tiles = tiles();
  const Product<T> product = {args, tile_source(args.x, args.positions), cut,
                              has_vector_channels(read_only(args.u), channels)};
  const bool vector =
      has_vector_columns(args.x, args.positions) && has_vector_columns(read_only(args.u), args.positions);
  const int64_t blocks = smaller(cut.tiles * cut.groups, max_blocks);
  const int columns = x * width<T>;
  if (vector)
    return launch(product_kernel<T, true>, blocks, dim3(x, y), shared_bytes<T, true>(cut, columns), stream, product);
  return launch(product_kernel<T, false>, blocks, dim3(x, y), shared_bytes<T, false>(cut, columns), stream, product);
}

template int mix_product<float>(const MixProduct<float>&, void*);
template int mix_product<double>(const MixProduct<double>&, void*);

template <class T>
int channel_mix(const ChannelMixArgs<T>& args, void* stream) {
  const T* const center = args.subtract_first ? args.offset : nullptr;
  const T* const offset = args.subtract_first ? nullptr : args.offset;
  return mix_product<T>(
      {args.x, args.matrix, args.channels, 1, center, offset, args.u, args.samples, args.channels, args.positions},
      stream);
}

template int channel_mix<float>(const ChannelMixArgs<float>&, void*);
template int channel_mix<double>(const ChannelMixArgs<double>&, void*);

}  // namespace pyglow::cuda
