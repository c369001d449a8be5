// The vector functions of math/elementary.h and math/activation.h on arrays, so that their error bounds can be tested.
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "math/activation.h"

namespace pyglow::cpu::PYGLOW_ISA {

// f(i, valid) for every vector of an array, of which the last may be cut.
template <class T, class F>
void for_vectors(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += lanes<T>) f(i, smaller(lanes<T>, count - i));
}

template <class T>
Vec<T> load_valid(const T* from, int64_t valid) {
  Vec<T> v{};
  __builtin_memcpy(&v, from, valid * sizeof(T));
  return v;
}

template <class T>
void elementary(const ElementaryArgs<T>& args, const Threads&) {
  for_vectors<T>(args.count, [&](int64_t i, int64_t valid) {
    Vec<T> v = load_valid(args.x + i, valid);
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
      case Elementary::expm1_negative:
        v = math::expm1_negative(v);
        break;
      case Elementary::erf:
        v = math::erf(v);
        break;
      case Elementary::erfc:
        v = math::erfc(v);
        break;
    }
    __builtin_memcpy(args.y + i, &v, valid * sizeof(T));
  });
}

template <class T>
void activation(const ActivationArgs<T>& args, const Threads&) {
  math::with_activation(args.kind, [&](auto kind) {
    for_vectors<T>(args.count, [&](int64_t i, int64_t valid) {
      Vec<T> v = load_valid(args.x + i, valid);
      if (args.grad == nullptr)
        v = math::activate<kind.value>(v, args.parameter);
      else
        v = math::activate_backward<kind.value>(load_valid(args.grad + i, valid), v, args.parameter);
      __builtin_memcpy(args.y + i, &v, valid * sizeof(T));
    });
  });
}

PYGLOW_CPU_INSTANTIATE(elementary, ElementaryArgs)
PYGLOW_CPU_INSTANTIATE(activation, ActivationArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
