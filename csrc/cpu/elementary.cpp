// The vector functions of math/elementary.h on arrays, so that their error bounds can be tested.
#include "cpu/isa.h"
#include "cpu/simd.h"

namespace pyglow::cpu::PYGLOW_ISA {

template <class T>
void elementary(const ElementaryArgs<T>& args, const Threads&) {
  for (int64_t i = 0; i < args.count; i += lanes<T>) {
    const int64_t valid = smaller(lanes<T>, args.count - i);
    Vec<T> v{};
    __builtin_memcpy(&v, args.x + i, valid * sizeof(T));
    switch (args.function) {
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
    __builtin_memcpy(args.y + i, &v, valid * sizeof(T));
  }
}

PYGLOW_CPU_INSTANTIATE(elementary, ElementaryArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
