// What GPUs compute coupling nets with besides matrix products, for tests on a CPU, whose nets go another way; compiled
// once per instruction set.
#include "math/window.h"
#include "cpu/isa.h"
#include "cpu/tiles.h"
#include "math/activation.h"
#include "math/half.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

template <class T>
T element(const void* data, NetType type, int64_t at) {
  if (type == NetType::bfloat16) return static_cast<T>(math::widen(static_cast<const BFloat16*>(data)[at]));
  if (type == NetType::float16) return static_cast<T>(math::widen(static_cast<const Float16*>(data)[at]));
  return static_cast<const T*>(data)[at];
}

template <class T>
void put(void* data, NetType type, int64_t at, T value) {
  if (type == NetType::bfloat16)
    math::narrow(static_cast<float>(value), static_cast<BFloat16*>(data)[at]);
  else if (type == NetType::float16)
    math::narrow(static_cast<float>(value), static_cast<Float16*>(data)[at]);
  else
    static_cast<T*>(data)[at] = value;
}

}  // namespace

template <class T>
void patches(const PatchesArgs<T>& args, const Threads& threads) {
  const int64_t positions = args.extent.positions(), count = args.samples * positions, taps = args.window.taps();
  const auto value = [&](int64_t n, int64_t c, int64_t p) {
    return element<T>(args.x.data, args.x.type, n * args.x.sample + c * args.x.channel + p * args.x.position);
  };
  parallel(threads, (count + summed_positions - 1) / summed_positions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share * summed_positions, last = smaller(first + summed_positions, count);
      for (int64_t row = first; row < last; ++row) {
        const math::Place place = math::place_of(args.extent, row % positions);
        for (int64_t i = 0; i < args.rows.length; ++i) {
          const int64_t c = i / taps;
          const math::Place shift = math::shift_of(args.window, static_cast<int>(i % taps), args.mirrored);
          const int64_t p = c < args.channels ? math::shifted(args.extent, place, shift) : -1;
          put(args.rows.data, args.rows.type, row * args.rows.length + i, p < 0 ? T(0) : value(row / positions, c, p));
        }
      }
      for (int64_t c = 0; args.sums != nullptr && c < args.channels; ++c) {
        T sum = T(0);
        for (int64_t row = first; row < last; ++row) sum += value(row / positions, c, row % positions);
        args.sums[share * args.channels + c] = sum;
      }
    }
  });
}

template <class T>
void tap_sums(const TapSumsArgs<T>& args, const Threads& threads) {
  const int64_t positions = args.extent.positions(), taps = args.window.taps();
  const WindowRows<const void>& rows = args.rows;
  parallel(threads, args.samples * positions, grain_of(taps * args.channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / positions, position = row % positions;
      const math::Place place = math::place_of(args.extent, position);
      for (int64_t c = 0; c < args.channels; ++c) {
        T sum = args.bias == nullptr ? T(0) : element<T>(args.bias, rows.type, c);
        math::for_each_tap(args.window, args.mirrored, [&](int tap, const math::Place& shift) {
          const int64_t p = math::shifted(args.extent, place, shift);
          if (p >= 0) sum += element<T>(rows.data, rows.type, (n * positions + p) * rows.length + c * taps + tap);
        });
        put(args.y.data, args.y.type, n * args.y.sample + c * args.y.channel + position * args.y.position, sum);
      }
    }
  });
}

template <class T>
void relu_backward(const ReluBackwardArgs<T>& args, const Threads& threads) {
  parallel(threads, args.shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      const int64_t first = share * args.per_share(), last = smaller(first + args.per_share(), args.rows);
      for (int64_t c = 0; c < args.columns; ++c) {
        T sum = T(0);
        for (int64_t row = first; row < last; ++row) {
          const int64_t at = row * args.columns + c;
          const T behind = element<T>(args.grad, args.type, at), h = element<T>(args.h, args.type, at);
          const T grad = math::leaky_relu_backward<false>(behind, h, T(0));
          put(args.grad, args.type, at, grad);
          sum += grad;
        }
        args.sums[share * args.columns + c] = sum;
      }
    }
  });
}

PYGLOW_CPU_INSTANTIATE(patches, PatchesArgs)
PYGLOW_CPU_INSTANTIATE(tap_sums, TapSumsArgs)
PYGLOW_CPU_INSTANTIATE(relu_backward, ReluBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
