// CUDA schedule of the channel moments: one pass over x, partial moments merged in a fixed order in two stages, so that
// two runs give the same bits.
#include "core.h"
#include "cuda/rows.cuh"
#include "cuda/tile.cuh"
#include "math/moments.h"

namespace pyglow::cuda {
namespace {

using math::Moments;

constexpr int batch = 8;  // units that a thread holds in registers
constexpr int min_units = 2;

// How the sums are cut. A block is `lanes` channel units by any number of threads that share their positions; positions
// are counted in units through all samples, `row` of them in each, and split s has units s * part to (s + 1) * part.
struct Cut {
  int lanes, threads;
  int64_t groups, row, part, total, splits;
  bool columns, channels;  // vectors along positions, across channels
};

template <class T>
Cut cut_of(const ChannelMomentsArgs<T>& args) {
  Cut cut = {};
  cut.splits = 1;
  if (args.channels == 0) return cut;
  cut.columns = has_vector_columns(args.x, args.positions);
  cut.channels = !cut.columns && has_vector_channels(args.x, args.channels);
  const bool adjacent = !cut.columns && channels_adjacent(args.x, args.positions);
  const int64_t units = cut.channels ? args.channels / width<T> : args.channels;
  cut.groups = adjacent ? divide_up(units, warp_threads) : units;
  cut.lanes = static_cast<int>(divide_up(units, cut.groups));
  const int64_t row = cut.columns ? args.positions / width<T> : args.positions;
  cut.row = larger<int64_t>(1, row);
  cut.total = args.samples * row;
  cut.threads = static_cast<int>(larger<int64_t>(1, smaller<int64_t>(block_threads / cut.lanes, cut.total)));
  const int64_t useful = divide_up(cut.total, static_cast<int64_t>(cut.threads) * min_units);
  const int64_t fitting = max_scratch_bytes / static_cast<int64_t>(sizeof(Moments)) / args.channels;
  cut.splits = larger<int64_t>(1, smaller(smaller(useful, fitting), divide_up(busy_blocks, cut.groups)));
  cut.part = divide_up(cut.total, cut.splits);
  return cut;
}

template <class T>
struct ChannelSums {
  Strided<const T> x;
  double *mean, *m2;  // written directly if there is one split
  Moments* partials;  // [C][splits]
  int64_t channels;
  Cut cut;
};

template <class T>
__device__ __forceinline__ void put(const ChannelSums<T>& s, int64_t channel, const Moments& moments) {
  s.mean[channel] = moments.mean;
  s.m2[channel] = moments.m2;
}

// Moments of the first `count` units of a batch, of elements k of each, or of all elements if `All`.
template <bool All, class T, class Unit>
__device__ __forceinline__ Moments batch_moments(const Unit (&units)[batch], int count, int k) {
  constexpr int elements = static_cast<int>(sizeof(Unit) / sizeof(T));
  T sum = T(0);
#pragma unroll
  for (int b = 0; b < batch; ++b)
#pragma unroll
    for (int i = 0; i < elements; ++i)
      if (All || i == k) sum += units[b].v[i];  // zero from `count` on
  const T n = static_cast<T>(All ? count * elements : count), mean = sum / n;
  T rest = T(0), squares = T(0);
#pragma unroll
  for (int b = 0; b < batch; ++b)
#pragma unroll
    for (int i = 0; i < elements; ++i)
      if (All || i == k) {
        const T deviation = b < count ? units[b].v[i] - mean : T(0);
        rest += deviation;
        squares += deviation * deviation;
      }
  return math::moments_about(mean, n, rest, squares);
}

// Merges shares[row * stride + i], row = 0 to rows - 1, into row 0 for every i that a thread has as its `index`; each
// of them has a thread for every row. All threads of the block call it.
__device__ __forceinline__ void merge_rows(Moments* shares, int row, int rows, int stride, int index, int own) {
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    __syncthreads();
    if (row + half < rows)
      for (int k = 0; k < own; ++k) {
        Moments& into = shares[row * stride + index + k];
        into = math::merge(into, shares[(row + half) * stride + index + k]);
      }
    rows = half;
  }
}

// A thread loads a batch of units, takes their moments in T, about their own mean, and merges these in double.
template <class T, bool Across, bool Vector>
__global__ void __launch_bounds__(block_threads, 2) moments_kernel(const ChannelSums<T> s) {
  constexpr int own = Across ? width<T> : 1;               // channels of a thread
  constexpr int along = Vector && !Across ? width<T> : 1;  // positions of a unit
  PYGLOW_DYNAMIC_SHARED(Moments, shares);                  // [threadIdx.y][threadIdx.x][own]
  const int stride = blockDim.x * own, index = threadIdx.x * own;
  const int64_t row = s.cut.row, step = s.x.position * along;
  const int64_t step_n = blockDim.y / row, step_u = blockDim.y - step_n * row;
  for (int64_t task = blockIdx.x; task < s.cut.splits * s.cut.groups; task += gridDim.x) {
    const int64_t split = task / s.cut.groups, group = task - split * s.cut.groups;
    const int64_t channel = (group * blockDim.x + threadIdx.x) * own;
    double count = 0, mean[own] = {}, m2[own] = {};
    if (channel < s.channels) {
      const T* const data = s.x.data + channel * s.x.channel;
      const int64_t end = smaller((split + 1) * s.cut.part, s.cut.total);
      int64_t at = split * s.cut.part + threadIdx.y, n = at / row, u = at - n * row;
      while (at < end) {
        Unit<T, Vector> units[batch];
        int loaded = 0;
#pragma unroll
        for (int b = 0; b < batch; ++b) {
          units[b] = {};
          if (at < end) {
            const T* const start = data + n * s.x.sample + u * step;
            if constexpr (Vector) {
              units[b] = load_vector(start);
            } else {
              units[b].v[0] = *start;
            }
            ++loaded;
          }
          at += blockDim.y;
          n += step_n;
          u += step_u;
          if (u >= row) {
            u -= row;
            ++n;
          }
        }
        double merged = 0;
#pragma unroll
        for (int k = 0; k < own; ++k) {
          const Moments sum = math::merge({count, mean[k], m2[k]}, batch_moments<!Across, T>(units, loaded, k));
          mean[k] = sum.mean;
          m2[k] = sum.m2;
          merged = sum.count;
        }
        count = merged;
      }
    }
    __syncthreads();  // the shares of the previous task have been read
#pragma unroll
    for (int k = 0; k < own; ++k) shares[threadIdx.y * stride + index + k] = {count, mean[k], m2[k]};
    merge_rows(shares, threadIdx.y, blockDim.y, stride, index, own);
    if (threadIdx.y != 0 || channel >= s.channels) continue;
#pragma unroll
    for (int k = 0; k < own; ++k) {
      if (s.cut.splits == 1) {
        put(s, channel + k, shares[index + k]);
      } else {
        s.partials[(channel + k) * s.cut.splits + split] = shares[index + k];
      }
    }
  }
}

// The second stage: a block merges the splits of a channel.
template <class T>
__global__ void __launch_bounds__(block_threads) merge_kernel(const ChannelSums<T> s) {
  PYGLOW_DYNAMIC_SHARED(Moments, shares);
  for (int64_t channel = blockIdx.x; channel < s.channels; channel += gridDim.x) {
    Moments sum = {0, 0, 0};
#pragma unroll 1  // the division in a merge is a call, around which unrolled loads would spill
    for (int64_t split = threadIdx.x; split < s.cut.splits; split += blockDim.x)
      sum = math::merge(sum, s.partials[channel * s.cut.splits + split]);
    __syncthreads();  // the shares of the previous channel have been read
    shares[threadIdx.x] = sum;
    merge_rows(shares, threadIdx.x, blockDim.x, 1, 0, 1);
    if (threadIdx.x == 0) put(s, channel, shares[0]);
  }
}

}  // namespace

// - Grid: channels (units of 16 bytes of them, up to 32 side by side, where channels are the neighbours in memory) by
//   splits of the positions: as many as occupy a large GPU, while each thread has two units and the partial moments fit
//   into 16 MB.
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor; each thread has up to eight 16-byte
//   loads in flight, 64 KB in all, more than bandwidth times latency (about 30 KB); 6 KB of shared memory, 24 KB with
//   vectors across channels.
// - Bound: memory. A thread's merge takes about 25 operations in double for 128 bytes (45 across channels), which a
//   multiprocessor with two units for double (12.0) does in the time that its share of the bandwidth takes.
template <class T>
int channel_moments(const ChannelMomentsArgs<T>& args, const Queue& queue) {
  if (args.channels == 0) return cudaSuccess;
  const Cut cut = cut_of(args);
  const int64_t partials = cut.splits > 1 ? cut.splits * args.channels * static_cast<int64_t>(sizeof(Moments)) : 0;
  const ChannelSums<T> sums = {args.x,        args.mean, args.m2, static_cast<Moments*>(queue.scratch(partials)),
                               args.channels, cut};
  const int64_t blocks = smaller(cut.splits * cut.groups, max_blocks);
  const dim3 threads(cut.lanes, cut.threads);
  const int64_t bytes = static_cast<int64_t>(sizeof(Moments)) * cut.lanes * cut.threads;
  const int error = cut.columns ? launch(moments_kernel<T, false, true>, blocks, threads, bytes, queue.stream, sums)
                    : cut.channels
                        ? launch(moments_kernel<T, true, true>, blocks, threads, bytes * width<T>, queue.stream, sums)
                        : launch(moments_kernel<T, false, false>, blocks, threads, bytes, queue.stream, sums);
  if (error != cudaSuccess || cut.splits == 1) return error;
  const int64_t rows = smaller<int64_t>(block_threads, cut.splits);
  return launch(merge_kernel<T>, smaller(args.channels, max_blocks), dim3(static_cast<unsigned>(rows)),
                rows * static_cast<int64_t>(sizeof(Moments)), queue.stream, sums);
}

PYGLOW_CUDA_INSTANTIATE(channel_moments, ChannelMomentsArgs)

}  // namespace pyglow::cuda
