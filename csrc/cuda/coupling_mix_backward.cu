// CUDA schedule of the gradients of out = M y + c, y = couple(in): two passes, neither of which writes y or grad_y. The
// first forms grad_y = M^T grad_out in registers and takes it through the coupling there; the second forms y again
// while staging it for grad_M.
#include "cuda/coupled_source.cuh"
#include "cuda/fused_product.cuh"
#include "cuda/mix_sums.cuh"

namespace pyglow::cuda {
namespace {

// Takes grad_y, which the product gives, through the coupling: grad_in and grad_net_out.
template <class T>
struct CouplingSink {
  static constexpr int tensors = 4;
  static constexpr bool computes = true;
  Strided<const T> in;
  NetOutput net_out;
  Strided<T> grad_in;
  NetGrad grad_net_out;
  const T* grad_log_det;  // (N,)
  int64_t kept, transformed;
  CouplingKind<T> kind;  // forward direction

  __device__ Steps<4> steps() const {
    return {{in.sample, net_out.sample, grad_in.sample, grad_net_out.sample},
            {in.position, net_out.position, grad_in.position, grad_net_out.position}};
  }

  // Offset of the thread's position i in one of the tensors; of all its positions in the vector path.
  template <bool Vector>
  __device__ __forceinline__ static int64_t at(const Columns<4>& columns, int tensor, int i) {
    return Vector ? columns.own[tensor] : columns.table[tensor * blockDim.x * width<T> + threadIdx.x + i * blockDim.x];
  }

  template <bool Vector>
  struct Loaded {
    Unit<T, Vector> u, shift, raw;
  };

  // What the coupling of unit i needs; not for kept channels.
  template <bool Vector>
  __device__ __forceinline__ Loaded<Vector> load(int64_t channel, const Columns<4>& columns, int i) const {
    const int64_t net_at = at<Vector>(columns, 1, i) + (channel - kept) * net_out.channel;
    Loaded<Vector> loaded = {};
    loaded.u = load_unit<Vector>(in.data + at<Vector>(columns, 0, i) + channel * in.channel);
    loaded.shift = fetch_net<T, Vector>(net_out.data, net_out.type, net_at);
    if (kind.map != ScaleMap::none)
      loaded.raw = fetch_net<T, Vector>(net_out.data, net_out.type, net_at + transformed * net_out.channel);
    return loaded;
  }

  // grad of y becomes that of u; stores those of the net's output.
  template <bool Vector>
  __device__ __forceinline__ void couple(Unit<T, Vector>& grad, Loaded<Vector>& x, int64_t channel,
                                         const Columns<4>& columns, int i, T weight) const {
    widen_net(net_out.type, x.shift, x.raw);
    with_scale_map(kind.map, [&](auto map) {
#pragma unroll
      for (int l = 0; l < unit_width<T, Vector>; ++l) {
        const math::Scale<T> scale = scale_at<decltype(map)::value>(x.raw.v[l], kind.params);
        const T y = couple_in(kind.order, x.u.v[l], x.shift.v[l], scale.s);
        const auto grads = couple_backward_in(kind.order, y, x.shift.v[l], scale.s, grad.v[l], weight);
        grad.v[l] = grads.in;
        x.shift.v[l] = grads.shift;
        x.raw.v[l] = grads.log_s * scale.slope;
      }
    });
    const int64_t grad_at = at<Vector>(columns, 3, i) + (channel - kept) * grad_net_out.channel;
    store_net<Vector>(grad_net_out.data, grad_net_out.type, grad_at, x.shift);
    if (kind.map != ScaleMap::none)
      store_net<Vector>(grad_net_out.data, grad_net_out.type, grad_at + transformed * grad_net_out.channel, x.raw);
  }

  // The rows leave the registers one after another, moving up, so that the code of the coupling is there once; what the
  // next row needs is loaded before.
  template <bool Vector, int Rows>
  __device__ __forceinline__ void store(const T (&sum)[Rows][width<T>], int64_t out, int64_t channels,
                                        const Columns<4>& columns, int64_t begin, int64_t positions) const {
    constexpr int unit = unit_width<T, Vector>, units = width<T> / unit;
    const int last = static_cast<int>(smaller<int64_t>(Rows, channels - out));
    bool there[units];
    T weight[units];
    Loaded<Vector> next[units];
    const auto load_row = [&](int k) {
#pragma unroll
      for (int i = 0; i < units; ++i)
        if (there[i] && k < last && out + k >= kept) next[i] = load<Vector>(out + k, columns, i);
    };
#pragma unroll
    for (int i = 0; i < units; ++i) {
      there[i] = at<Vector>(columns, 0, i) != outside;
      const int64_t j = begin + (Vector ? threadIdx.x * width<T> : threadIdx.x + i * blockDim.x);
      weight[i] = there[i] ? grad_log_det[j / positions] : T(0);
      next[i] = {};
    }
    T rows[Rows][width<T>];
#pragma unroll
    for (int k = 0; k < Rows; ++k)
#pragma unroll
      for (int i = 0; i < width<T>; ++i) rows[k][i] = sum[k][i];
    load_row(0);
#pragma unroll 1
    for (int k = 0; k < last; ++k) {
      const int64_t channel = out + k;
      Loaded<Vector> now[units];
#pragma unroll
      for (int i = 0; i < units; ++i) now[i] = next[i];
      load_row(k + 1);
#pragma unroll
      for (int i = 0; i < units; ++i) {
        if (!there[i]) continue;
        Unit<T, Vector> grad;
#pragma unroll
        for (int l = 0; l < unit; ++l) grad.v[l] = rows[0][i * unit + l];
        if (channel >= kept) couple<Vector>(grad, now[i], channel, columns, i, weight[i]);
        store_unit<Vector>(grad_in.data + at<Vector>(columns, 2, i) + channel * grad_in.channel, grad);
      }
#pragma unroll
      for (int l = 0; l + 1 < Rows; ++l)
#pragma unroll
        for (int i = 0; i < width<T>; ++i) rows[l][i] = rows[l + 1][i];
    }
  }
};

}  // namespace

// First pass:
// - Grid: as coupling_mix; each output channel is in one group, so nothing is evaluated twice.
// - Occupancy: up to 128 registers, so 2 blocks of 256 threads on a multiprocessor (double: 1); at most 47 KB of shared
//   memory. While a thread takes one row through the coupling it loads the next: three to six 16-byte loads are in
//   flight, and the other block stages meanwhile.
// - Bound: memory up to about C = 90 (4.5 C values moved for C^2 multiply-adds), then the multiply-add units.
// Second pass: mix_sums.cuh; up to C = 64 the coupling is evaluated once more there, above once for each 64 channels,
// beside 64 multiply-adds for each element. That reads in and net_out again, 2 C values, where keeping y would take
// memory of the state's size, written once and read once.
template <class T>
int coupling_mix_backward(const CouplingMixBackwardArgs<T>& args, const Queue& queue) {
  const int64_t samples = args.samples, channels = args.channels, positions = args.positions;
  if (channels == 0) return cudaSuccess;
  const T* const none = nullptr;
  const SplitSource<T> grad_out = split_source(args.grad_out, positions);
  const CoupledSource<T> y =
      coupled_source(args.in, args.net_out, none, channels, args.transformed, positions, args.kind);
  const bool reading = has_vector_columns(grad_out, positions) && has_vector_columns(y, positions);
  if (samples * positions > 0) {
    const bool vector = reading && has_vector_columns(read_only(args.grad_in), positions) &&
                        has_vector_net<T>(args.grad_net_out, positions);
    const CouplingSink<T> sink = {args.in,           args.net_out, args.grad_in,     args.grad_net_out,
                                  args.grad_log_det, y.kept,       args.transformed, args.kind};
    const int error = fused_product<T>(grad_out, sink, args.matrix, 1, channels, none, samples, channels, positions,
                                       vector, {}, queue.stream);
    if (error != cudaSuccess) return error;
  }
  return mix_sums<T>(y, grad_out, args.grad_matrix, args.grad_offset, samples, channels, positions, reading, queue);
}

PYGLOW_CUDA_INSTANTIATE(coupling_mix_backward, CouplingMixBackwardArgs)

}  // namespace pyglow::cuda
