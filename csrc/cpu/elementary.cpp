// The vector functions of math/elementary.h on arrays, so that their error bounds can be tested.
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace pyglow::cpu::PYGLOW_ISA {

template <class T>
void elementary(Elementary function, const T* x, T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<T>) {
    const int64_t valid = smaller(lanes<T>, count - i);
    Vec<T> v{};
    __builtin_memcpy(&v, x + i, valid * sizeof(T));
    switch (function) {
      case Elementary::exp:
        v = math::exp(v);
        break;
      case Elementary::log:
        v = math::log(v);
        break;
      case Elementary::log1p_unit:
        v = math::log1p_unit(v);
        break;
      case Elementary::tanh:
        v = math::tanh(v);
        break;
      case Elementary::atan:
        v = math::atan(v);
        break;
    }
    __builtin_memcpy(y + i, &v, valid * sizeof(T));
  }
}

template void elementary<float>(Elementary, const float*, float*, int64_t);
template void elementary<double>(Elementary, const double*, double*, int64_t);

}  // namespace pyglow::cpu::PYGLOW_ISA
