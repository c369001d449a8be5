// The C interface to the kernels of pyglow::cuda that emulator.py and sanitized.cpp call: plain numbers and pointers
// in, null or what went wrong out. Scratch memory is of the exact size and filled with NaN bytes; without
// AddressSanitizer, which knows its end, the bytes behind it must stay as they are.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core.h"

namespace {

constexpr int64_t max_scratch_bytes = 16 << 20;
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t guard_bytes = 0;
#else
constexpr int64_t guard_bytes = 4096;
#endif

// What a call takes of device memory, freed after it.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  pyglow::cuda::Queue queue() { return {nullptr, &allocate, this}; }
  void expect_inside() const {
    for (int64_t i = 0; memory_ != nullptr && i < guard_bytes; ++i)
      if (static_cast<const unsigned char*>(memory_)[bytes_ + i] != 0xff)
        throw std::runtime_error("memory behind the scratch memory was written");
  }

 private:
  static void* allocate(int64_t bytes, void* context) {
    if (bytes > max_scratch_bytes) throw std::runtime_error("scratch memory of " + std::to_string(bytes) + " bytes");
    Scratch& scratch = *static_cast<Scratch*>(context);
    if (scratch.memory_ != nullptr) throw std::runtime_error("a second piece of scratch memory");
    scratch.bytes_ = bytes;
    scratch.memory_ = std::malloc(bytes + guard_bytes);
    return std::memset(scratch.memory_, 0xff, bytes + guard_bytes);
  }

  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

#define PYGLOW_RUN(kernel, Args)                                                 \
  template <class T>                                                             \
  void run(const pyglow::Args<T>& args) {                                        \
    Scratch scratch;                                                             \
    const int error = pyglow::cuda::kernel(args, scratch.queue());               \
    if (error != 0) throw std::runtime_error(pyglow::cuda::error_string(error)); \
    scratch.expect_inside();                                                     \
  }
PYGLOW_KERNELS(PYGLOW_RUN)
#undef PYGLOW_RUN

struct Tensor {
  void* data;
  int64_t sample, channel, position;  // strides
};
struct Image {
  Tensor tensor;
  int64_t width, row;  // as Squeezed
};
struct Net {
  Tensor tensor;
  int type;  // as NetType
};
struct Variant {
  int map, order, inverse;
  double bias, eps, clamp, factor;
};
struct Sizes {
  int64_t samples, channels, transformed, positions;
};

template <class T>
pyglow::Strided<T> view(const Tensor& x) {
  return {static_cast<T*>(x.data), x.sample, x.channel, x.position};
}
template <class T>
pyglow::Squeezed<T> view(const Image& x) {
  return {view<T>(x.tensor), x.width, x.row};
}

template <class Data>
pyglow::NetTensor<Data> net_view(const Net& x) {
  return {x.tensor.data, static_cast<pyglow::NetType>(x.type), x.tensor.sample, x.tensor.channel, x.tensor.position};
}
template <class T>
pyglow::CouplingKind<T> kind_of(const Variant& v) {
  return {static_cast<pyglow::ScaleMap>(v.map),
          static_cast<pyglow::Order>(v.order),
          v.inverse != 0,
          {static_cast<T>(v.bias), static_cast<T>(v.eps), static_cast<T>(v.clamp), static_cast<T>(v.factor),
           static_cast<T>(std::log(v.factor))}};
}

template <class T>
pyglow::CouplingArgs<T> coupling_args(const Sizes& sizes, const Variant& variant, const Tensor& in, const Net& net_out,
                                      const Tensor& out, void* log_det) {
  return {.in = view<const T>(in),
          .net_out = net_view<const void>(net_out),
          .out = view<T>(out),
          .log_det = static_cast<T*>(log_det),
          .samples = sizes.samples,
          .channels = sizes.channels,
          .transformed = sizes.transformed,
          .positions = sizes.positions,
          .kind = kind_of<T>(variant)};
}

// Calls f(T()) for float or double.
template <class F>
const char* guarded(int is_double, unsigned seed, const F& f) {
  thread_local std::string message;
  emu::schedule_seed = seed;
  emu::launched.clear();
  try {
    if (is_double) {
      f(double());
    } else {
      f(float());
    }
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

struct Map {
  const void *scale, *offset, *center;  // offset and center may be null
  const int64_t* index;
};

template <class T>
pyglow::Gather<T> map_of(const Map& map) {
  return {static_cast<const T*>(map.scale), static_cast<const T*>(map.offset), static_cast<const T*>(map.center),
          map.index};
}

// The addresses of all maps, parameter by parameter.
template <class T>
pyglow::Factors<T> factors_of(const Sizes& sizes, const void* const* table) {
  const auto of = [&](int i) { return reinterpret_cast<const T* const*>(table + i * sizes.samples); };
  return {reinterpret_cast<const int64_t* const*>(table),
          of(1),
          of(2),
          of(3),
          of(4),
          of(5),
          of(6),
          sizes.samples,
          sizes.channels};
}

// The kernel by its distance from the library's beginning, as the symbol table has it.
struct Launch {
  int64_t kernel, blocks, x, y, dynamic_bytes;
};

Launch launch_of(const emu::Launched& launched) {
  Dl_info library = {};
  dladdr(launched.kernel, &library);
  const int64_t offset = static_cast<const char*>(launched.kernel) - static_cast<const char*>(library.dli_fbase);
  return {offset, launched.grid.x, launched.block.x, launched.block.y, static_cast<int64_t>(launched.dynamic_bytes)};
}

}  // namespace

extern "C" {

// ---- Couplings ----

const char* emulated_coupling(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in, Net net_out,
                              Tensor out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(coupling_args<T>(sizes, variant, in, net_out, out, log_det));
  });
}

const char* emulated_coupling_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor out,
                                       Net net_out, Tensor grad_out, const void* grad_log_det, Tensor in,
                                       Tensor grad_in, Net grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::CouplingBackwardArgs<T>{.out = view<const T>(out),
                                        .net_out = net_view<const void>(net_out),
                                        .grad_out = view<const T>(grad_out),
                                        .grad_log_det = static_cast<const T*>(grad_log_det),
                                        .in = view<T>(in),
                                        .grad_in = view<T>(grad_in),
                                        .grad_net_out = net_view<void>(grad_net_out),
                                        .samples = sizes.samples,
                                        .channels = sizes.channels,
                                        .transformed = sizes.transformed,
                                        .positions = sizes.positions,
                                        .kind = kind_of<T>(variant)});
  });
}

// ---- Channel mixing ----

const char* emulated_channel_mix(int is_double, unsigned seed, Sizes sizes, Image x, const void* matrix,
                                 const void* offset, Image u, int subtract_first) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::ChannelMixArgs<T>{.x = view<const T>(x),
                                  .matrix = static_cast<const T*>(matrix),
                                  .offset = static_cast<const T*>(offset),
                                  .u = view<T>(u),
                                  .samples = sizes.samples,
                                  .channels = sizes.channels,
                                  .positions = sizes.positions,
                                  .subtract_first = subtract_first != 0});
  });
}

const char* emulated_channel_mix_backward(int is_double, unsigned seed, Sizes sizes, Image x, Tensor grad_u,
                                          Tensor added, int64_t added_channels, const void* matrix, const void* center,
                                          Image grad_x, void* grad_matrix, void* grad_offset) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::ChannelMixBackwardArgs<T>{.x = view<const T>(x),
                                          .grad_u = {view<const T>(grad_u), view<const T>(added), added_channels},
                                          .matrix = static_cast<const T*>(matrix),
                                          .center = static_cast<const T*>(center),
                                          .grad_x = view<T>(grad_x),
                                          .grad_matrix = static_cast<T*>(grad_matrix),
                                          .grad_offset = static_cast<T*>(grad_offset),
                                          .samples = sizes.samples,
                                          .channels = sizes.channels,
                                          .positions = sizes.positions});
  });
}

// ---- Passes that join a coupling with a channel mixing ----

const char* emulated_coupling_mix(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in, Net net_out,
                                  const void* matrix, const void* offset, Tensor out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::CouplingMixArgs<T>{.coupling = coupling_args<T>(sizes, variant, in, net_out, out, log_det),
                                   .matrix = static_cast<const T*>(matrix),
                                   .offset = static_cast<const T*>(offset)});
  });
}

const char* emulated_coupling_mix_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor in,
                                           Net net_out, Tensor grad_out, Tensor added, int64_t added_channels,
                                           const void* grad_log_det, const void* matrix, Tensor grad_in,
                                           Net grad_net_out, void* grad_matrix, void* grad_offset) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::CouplingMixBackwardArgs<T>{.in = view<const T>(in),
                                           .net_out = net_view<const void>(net_out),
                                           .grad_out = {view<const T>(grad_out), view<const T>(added), added_channels},
                                           .grad_log_det = static_cast<const T*>(grad_log_det),
                                           .matrix = static_cast<const T*>(matrix),
                                           .grad_in = view<T>(grad_in),
                                           .grad_net_out = net_view<void>(grad_net_out),
                                           .grad_matrix = static_cast<T*>(grad_matrix),
                                           .grad_offset = static_cast<T*>(grad_offset),
                                           .samples = sizes.samples,
                                           .channels = sizes.channels,
                                           .transformed = sizes.transformed,
                                           .positions = sizes.positions,
                                           .kind = kind_of<T>(variant)});
  });
}

const char* emulated_step_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor y, Net net_out,
                                   Tensor grad_y, const void* grad_log_det, const void* inverse_matrix,
                                   const void* offset, Tensor x, Tensor grad_u, Net grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::StepBackwardArgs<T>{.y = view<const T>(y),
                                    .net_out = net_view<const void>(net_out),
                                    .grad_y = view<const T>(grad_y),
                                    .grad_log_det = static_cast<const T*>(grad_log_det),
                                    .inverse_matrix = static_cast<const T*>(inverse_matrix),
                                    .offset = static_cast<const T*>(offset),
                                    .x = view<T>(x),
                                    .grad_u = view<T>(grad_u),
                                    .grad_net_out = net_view<void>(grad_net_out),
                                    .samples = sizes.samples,
                                    .channels = sizes.channels,
                                    .transformed = sizes.transformed,
                                    .positions = sizes.positions,
                                    .kind = kind_of<T>(variant)});
  });
}

// ---- Channel mixing by a permutation, alone and joined with a coupling ----

const char* emulated_gather(int is_double, unsigned seed, Sizes sizes, Variant variant, Image in, Net net_out, Map map,
                            Image out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::GatherArgs<T>{.in = view<const T>(in),
                              .net_out = net_view<const void>(net_out),
                              .map = map_of<T>(map),
                              .out = view<T>(out),
                              .log_det = static_cast<T*>(log_det),
                              .samples = sizes.samples,
                              .channels = sizes.channels,
                              .transformed = sizes.transformed,
                              .positions = sizes.positions,
                              .kind = kind_of<T>(variant)});
  });
}

const char* emulated_gather_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Image in, Net net_out,
                                     Tensor grad_out, Tensor added, int64_t added_channels, const void* grad_log_det,
                                     Map map, Image grad_in, Net grad_net_out, void* grad_scale, void* grad_offset) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::GatherBackwardArgs<T>{.in = view<const T>(in),
                                      .net_out = net_view<const void>(net_out),
                                      .grad_out = {view<const T>(grad_out), view<const T>(added), added_channels},
                                      .grad_log_det = static_cast<const T*>(grad_log_det),
                                      .map = map_of<T>(map),
                                      .grad_in = view<T>(grad_in),
                                      .grad_net_out = net_view<void>(grad_net_out),
                                      .grad_scale = static_cast<T*>(grad_scale),
                                      .grad_offset = static_cast<T*>(grad_offset),
                                      .samples = sizes.samples,
                                      .channels = sizes.channels,
                                      .transformed = sizes.transformed,
                                      .positions = sizes.positions,
                                      .kind = kind_of<T>(variant)});
  });
}

const char* emulated_step_gather_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor y,
                                          Net net_out, Tensor grad_y, const void* grad_log_det, Map map, Tensor x,
                                          Tensor grad_u, Net grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::StepGatherBackwardArgs<T>{.y = view<const T>(y),
                                          .net_out = net_view<const void>(net_out),
                                          .grad_y = view<const T>(grad_y),
                                          .grad_log_det = static_cast<const T*>(grad_log_det),
                                          .map = map_of<T>(map),
                                          .x = view<T>(x),
                                          .grad_u = view<T>(grad_u),
                                          .grad_net_out = net_view<void>(grad_net_out),
                                          .samples = sizes.samples,
                                          .channels = sizes.channels,
                                          .transformed = sizes.transformed,
                                          .positions = sizes.positions,
                                          .kind = kind_of<T>(variant)});
  });
}

// ---- Sums over values ----

const char* emulated_gaussian_log_prob(int is_double, unsigned seed, Sizes sizes, Tensor z, Tensor mean, Tensor log_sd,
                                       void* log_prob) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::GaussianArgs<T>{.z = view<const T>(z),
                                .mean = view<const T>(mean),
                                .log_sd = view<const T>(log_sd),
                                .log_prob = static_cast<T*>(log_prob),
                                .samples = sizes.samples,
                                .channels = sizes.channels,
                                .positions = sizes.positions});
  });
}

const char* emulated_gaussian_log_prob_backward(int is_double, unsigned seed, Sizes sizes, Tensor z, Tensor mean,
                                                Tensor log_sd, const void* grad_log_prob, Tensor grad_z,
                                                Tensor grad_mean, Tensor grad_log_sd) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::GaussianBackwardArgs<T>{.z = view<const T>(z),
                                        .mean = view<const T>(mean),
                                        .log_sd = view<const T>(log_sd),
                                        .grad_log_prob = static_cast<const T*>(grad_log_prob),
                                        .grad_z = view<T>(grad_z),
                                        .grad_mean = view<T>(grad_mean),
                                        .grad_log_sd = view<T>(grad_log_sd),
                                        .samples = sizes.samples,
                                        .channels = sizes.channels,
                                        .positions = sizes.positions});
  });
}

const char* emulated_gaussian_sample(int is_double, unsigned seed, Sizes sizes, Tensor noise, Tensor mean,
                                     Tensor log_sd, Tensor z) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::GaussianSampleArgs<T>{.noise = view<const T>(noise),
                                      .mean = view<const T>(mean),
                                      .log_sd = view<const T>(log_sd),
                                      .z = view<T>(z),
                                      .samples = sizes.samples,
                                      .channels = sizes.channels,
                                      .positions = sizes.positions});
  });
}

// ---- Matrices alone ----

const char* emulated_invert_matrices(int is_double, unsigned seed, Sizes sizes, const void* matrices, void* inverses,
                                     void* log_dets) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::InvertMatricesArgs<T>{.matrices = static_cast<const T*>(matrices),
                                      .inverses = static_cast<T*>(inverses),
                                      .log_dets = static_cast<T*>(log_dets),
                                      .count = sizes.samples,
                                      .channels = sizes.channels});
  });
}

const char* emulated_fold(int is_double, unsigned seed, Sizes sizes, const void* const* table, void* matrices,
                          void* offsets, void* log_dets) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    run(pyglow::FoldArgs<T>{factors_of<T>(sizes, table), static_cast<T*>(matrices), static_cast<T*>(offsets),
                            static_cast<T*>(log_dets)});
  });
}

// grads: of matrices, offsets and log_dets; results: of lower, upper, log_diag, log_scale and bias.
const char* emulated_fold_backward(int is_double, unsigned seed, Sizes sizes, const void* const* table,
                                   const void* const* grads, void* const* results) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    const auto in = [&](int i) { return static_cast<const T*>(grads[i]); };
    const auto out = [&](int i) { return static_cast<T*>(results[i]); };
    run(pyglow::FoldBackwardArgs<T>{factors_of<T>(sizes, table), in(0), in(1), in(2), out(0), out(1), out(2), out(3),
                                    out(4)});
  });
}

// ---- The record of launches ----

void emulated_only_recorded(int only) { emu::only_recorded = only != 0; }

void emulated_multiprocessors(int64_t number) { multiprocessors = number; }

// Fills `out` with the launches of this thread's last call, as far as there is room, and returns how many they were.
int64_t emulated_launches(Launch* out, int64_t room) {
  const int64_t count = static_cast<int64_t>(emu::launched.size());
  for (int64_t i = 0; i < std::min(count, room); ++i) out[i] = launch_of(emu::launched[i]);
  return count;
}

}  // extern "C"
