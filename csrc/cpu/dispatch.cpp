// Chooses the instruction set at run time. Compiled for the baseline processor: it runs before anything is known.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core.h"
#include "cpu/isa.h"

namespace pyglow::cpu {
namespace {

bool supported(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
#ifdef PYGLOW_HAVE_AVX2
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
      return false;
#endif
    case Isa::avx512:
#ifdef PYGLOW_HAVE_AVX512
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
#else
      return false;
#endif
  }
  return false;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "";
}

constexpr Isa best_first[] = {Isa::avx512, Isa::avx2, Isa::portable};

Isa select() {
  const char* wanted = std::getenv("PYGLOW_CPU");
  std::string choices;
  for (Isa isa : best_first) {
    if (!supported(isa)) continue;
    if (wanted == nullptr || *wanted == '\0' || std::string(wanted) == name(isa)) return isa;
    choices += (choices.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::invalid_argument("PYGLOW_CPU: expected one of " + choices + " on this machine, found " + wanted);
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = select();
  return isa;
}

const char* instruction_set() { return name(selected_isa()); }

// One entry point per kernel of core.h, forwarding to the selected instruction set.
#ifdef PYGLOW_HAVE_AVX2
#define PYGLOW_CASE_AVX2(call) \
  case Isa::avx2:              \
    return avx2::call;
#else
#define PYGLOW_CASE_AVX2(call)
#endif
#ifdef PYGLOW_HAVE_AVX512
#define PYGLOW_CASE_AVX512(call) \
  case Isa::avx512:              \
    return avx512::call;
#else
#define PYGLOW_CASE_AVX512(call)
#endif
#define PYGLOW_FORWARD(call) \
  switch (selected_isa()) {  \
    PYGLOW_CASE_AVX512(call) \
    PYGLOW_CASE_AVX2(call)   \
    default:                 \
      return portable::call; \
  }

template <class T>
void channel_mix(const ChannelMixArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(channel_mix(args, threads))
}
template <class T>
void channel_mix_backward(const ChannelMixBackwardArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(channel_mix_backward(args, threads))
}
template <class T>
void coupling(const CouplingArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(coupling(args, threads))
}
template <class T>
void coupling_backward(const CouplingBackwardArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(coupling_backward(args, threads))
}
template <class T>
void coupling_mix(const CouplingMixArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(coupling_mix(args, threads))
}
template <class T>
void coupling_mix_backward(const CouplingMixBackwardArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(coupling_mix_backward(args, threads))
}
template <class T>
void step_backward(const StepBackwardArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(step_backward(args, threads))
}
template <class T>
void channel_moments(const ChannelMomentsArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(channel_moments(args, threads))
}
template <class T>
void gaussian_log_prob(const GaussianArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(gaussian_log_prob(args, threads))
}
template <class T>
void gaussian_log_prob_backward(const GaussianBackwardArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(gaussian_log_prob_backward(args, threads))
}
template <class T>
void gaussian_sample(const GaussianSampleArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(gaussian_sample(args, threads))
}
template <class T>
void shift_columns(const ColumnsArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(shift_columns(args, threads))
}
template <class T>
void shift_sum(const ShiftSumArgs<T>& args, const Threads& threads) {
  PYGLOW_FORWARD(shift_sum(args, threads))
}
template <class T>
int64_t packed_size(int64_t rows, int64_t inner) {
  PYGLOW_FORWARD(packed_size<T>(rows, inner))
}
template <class T>
void pack_left(const Matrix<const T>& a, bool turned, int64_t rows, int64_t inner, T* packed, const Threads& threads) {
  PYGLOW_FORWARD(pack_left(a, turned, rows, inner, packed, threads))
}
template <class T>
void matrix_products(const ProductArgs<T>* products, int64_t count, const Threads& threads) {
  PYGLOW_FORWARD(matrix_products(products, count, threads))
}
template <class T>
void elementary(Elementary function, const T* x, T* y, int64_t count){PYGLOW_FORWARD(elementary(function, x, y, count))}

#define PYGLOW_INSTANTIATE(T)                                                                     \
  template void channel_mix<T>(const ChannelMixArgs<T>&, const Threads&);                         \
  template void channel_mix_backward<T>(const ChannelMixBackwardArgs<T>&, const Threads&);        \
  template void coupling<T>(const CouplingArgs<T>&, const Threads&);                              \
  template void coupling_backward<T>(const CouplingBackwardArgs<T>&, const Threads&);             \
  template void coupling_mix<T>(const CouplingMixArgs<T>&, const Threads&);                       \
  template void coupling_mix_backward<T>(const CouplingMixBackwardArgs<T>&, const Threads&);      \
  template void step_backward<T>(const StepBackwardArgs<T>&, const Threads&);                     \
  template void channel_moments<T>(const ChannelMomentsArgs<T>&, const Threads&);                 \
  template void gaussian_log_prob<T>(const GaussianArgs<T>&, const Threads&);                     \
  template void gaussian_log_prob_backward<T>(const GaussianBackwardArgs<T>&, const Threads&);    \
  template void gaussian_sample<T>(const GaussianSampleArgs<T>&, const Threads&);                 \
  template void shift_columns<T>(const ColumnsArgs<T>&, const Threads&);                          \
  template void shift_sum<T>(const ShiftSumArgs<T>&, const Threads&);                             \
  template int64_t packed_size<T>(int64_t, int64_t);                                              \
  template void pack_left<T>(const Matrix<const T>&, bool, int64_t, int64_t, T*, const Threads&); \
  template void matrix_products<T>(const ProductArgs<T>*, int64_t, const Threads&);               \
  template void elementary<T>(Elementary, const T*, T*, int64_t);
PYGLOW_INSTANTIATE(float) PYGLOW_INSTANTIATE(double)

}  // namespace pyglow::cpu
