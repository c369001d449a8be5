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

// In the order of Elementary.
template <class T>
constexpr Vec<T> (*functions[])(Vec<T>) = {
    math::exp, math::log, math::log1p_unit, math::tanh, math::atan, math::expm1_negative, math::erf, math::erfc};

template <class T>
void elementary(const ElementaryArgs<T>& args, const Threads&) {
  const auto function = functions<T>[static_cast<int>(args.function)];
  for_vectors<T>(args.count, [&](int64_t i, int64_t valid) {
    const Vec<T> v = function(load_valid(args.x + i, valid));
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
