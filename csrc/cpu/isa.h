// The instruction sets that the CPU kernels are compiled for, and the choice made when the module runs.
#pragma once
#include "core.h"

namespace pyglow::cpu {

enum class Isa { portable, avx2, avx512 };

// The best one that is both compiled in and supported by this processor and system, or what PYGLOW_CPU asks for.
// Decided once; throws std::invalid_argument if PYGLOW_CPU cannot be honoured.
Isa selected_isa();

// The kernels of each instruction set: the functions of core.h, compiled from the same sources.
#define PYGLOW_DECLARE_KERNELS(isa)                                                             \
  namespace isa {                                                                               \
  template <class T>                                                                            \
  void channel_mix(const ChannelMixArgs<T>& args, const Threads& threads);                      \
  template <class T>                                                                            \
  void channel_mix_backward(const ChannelMixBackwardArgs<T>& args, const Threads& threads);     \
  template <class T>                                                                            \
  void coupling(const CouplingArgs<T>& args, const Threads& threads);                           \
  template <class T>                                                                            \
  void coupling_backward(const CouplingBackwardArgs<T>& args, const Threads& threads);          \
  template <class T>                                                                            \
  void coupling_mix(const CouplingMixArgs<T>& args, const Threads& threads);                    \
  template <class T>                                                                            \
  void coupling_mix_backward(const CouplingMixBackwardArgs<T>& args, const Threads& threads);   \
  template <class T>                                                                            \
  void step_backward(const StepBackwardArgs<T>& args, const Threads& threads);                  \
  template <class T>                                                                            \
  void channel_moments(const ChannelMomentsArgs<T>& args, const Threads& threads);              \
  template <class T>                                                                            \
  void gaussian_log_prob(const GaussianArgs<T>& args, const Threads& threads);                  \
  template <class T>                                                                            \
  void gaussian_log_prob_backward(const GaussianBackwardArgs<T>& args, const Threads& threads); \
  template <class T>                                                                            \
  void gaussian_sample(const GaussianSampleArgs<T>& args, const Threads& threads);              \
  template <class T>                                                                            \
  void shift_columns(const ColumnsArgs<T>& args, const Threads& threads);                       \
  template <class T>                                                                            \
  void shift_sum(const ShiftSumArgs<T>& args, const Threads& threads);                          \
  template <class T>                                                                            \
  int64_t packed_size(int64_t rows, int64_t inner);                                             \
  template <class T>                                                                            \
  void pack_left(const Matrix<const T>& a, bool turned, int64_t rows, int64_t inner, T* packed, \
                 const Threads& threads);                                                       \
  template <class T>                                                                            \
  void matrix_products(const ProductArgs<T>* products, int64_t count, const Threads& threads);  \
  template <class T>                                                                            \
  void elementary(Elementary function, const T* x, T* y, int64_t count);                        \
  }
PYGLOW_DECLARE_KERNELS(portable)
PYGLOW_DECLARE_KERNELS(avx2)
PYGLOW_DECLARE_KERNELS(avx512)
#undef PYGLOW_DECLARE_KERNELS

}  // namespace pyglow::cpu
