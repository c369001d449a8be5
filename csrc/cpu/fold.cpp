// CPU schedule of the channel maps that actnorms and convolutions in LU factors are folded into: a map at a time, row by
// row; compiled once per instruction set.
#include "core.h"
#include "cpu/isa.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// One map's factors as tables, and the product that its matrix is made of.
template <class T>
struct Tables {
  T *upper, *product, *matrix;  // (C, C)
  T *diagonal, *scale;          // (C,)
  int64_t channels;

  static int64_t bytes(int64_t channels) {
    return (3 * channels * channels + 2 * channels) * static_cast<int64_t>(sizeof(T));
  }
  Tables(void* memory, int64_t channels) : channels(channels) {
    upper = static_cast<T*>(memory);
    product = upper + channels * channels;
    matrix = product + channels * channels;
    diagonal = matrix + channels * channels;
    scale = diagonal + channels;
  }

  void fold(const Factors<T>& factors, int64_t k) {
    const int64_t n = channels;
    const T *lower = factors.lower[k], *given = factors.upper[k];
    for (int64_t i = 0; i < n; ++i) {
      diagonal[i] = factors.sign_diag[k][i] * math::exp(factors.log_diag[k][i]);
      scale[i] = math::exp(factors.log_scale[k][i]);
      for (int64_t j = 0; j < n; ++j) upper[i * n + j] = j > i ? given[i * n + j] : T(0);
      upper[i * n + i] = diagonal[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      T* const row = product + i * n;
      for (int64_t j = 0; j < n; ++j) row[j] = upper[i * n + j];
      for (int64_t t = 0; t < i; ++t) {
        const T factor = lower[i * n + t];
        for (int64_t j = 0; j < n; ++j) row[j] += factor * upper[t * n + j];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const T* const from = product + factors.permutation[k][i] * n;
      for (int64_t j = 0; j < n; ++j) matrix[i * n + j] = from[j] * scale[j];
    }
  }
};

template <class T>
void each_map(const Factors<T>& factors, const Threads& threads, int64_t tables, auto&& body) {
  const int64_t n = factors.channels, room = Tables<T>::bytes(n) + tables * n * n * static_cast<int64_t>(sizeof(T));
  parallel(threads, factors.count, grain_of(n * n * n), [&](int64_t begin, int64_t end) {
    void* const memory = thread_scratch(Scratch::tile, static_cast<std::size_t>(room) + 1);
    Tables<T> map(memory, n);
    for (int64_t k = begin; k < end; ++k) {
      map.fold(factors, k);
      body(k, map, map.scale + n);
    }
  });
}

}  // namespace

template <class T>
void fold(const FoldArgs<T>& args, const Threads& threads) {
  const int64_t n = args.factors.channels;
  each_map(args.factors, threads, 0, [&](int64_t k, const Tables<T>& map, T*) {
    const T* const bias = args.factors.bias[k];
    double log_det = 0;
    for (int64_t i = 0; i < n; ++i) {
      T offset = 0;
      for (int64_t j = 0; j < n; ++j) {
        args.matrices[(k * n + i) * n + j] = map.matrix[i * n + j];
        offset += map.matrix[i * n + j] * bias[j];
      }
      args.offsets[k * n + i] = offset;
      log_det += static_cast<double>(args.factors.log_diag[k][i]) + static_cast<double>(args.factors.log_scale[k][i]);
    }
    args.log_dets[k] = static_cast<T>(log_det);
  });
}

template <class T>
void fold_backward(const FoldBackwardArgs<T>& args, const Threads& threads) {
  const int64_t n = args.factors.channels;
  each_map(args.factors, threads, 1, [&](int64_t k, const Tables<T>& map, T* of_product) {
    const T* const lower = args.factors.lower[k];
    const T* const bias = args.factors.bias[k];
    const T of_log_det = args.grad_log_dets[k];
    T *of_lower = args.grad_lower + k * n * n, *of_upper = args.grad_upper + k * n * n;
    T *of_log_diag = args.grad_log_diag + k * n, *of_log_scale = args.grad_log_scale + k * n;
    T* const of_bias = args.grad_bias + k * n;
    for (int64_t j = 0; j < n; ++j) {
      of_bias[j] = 0;
      of_log_scale[j] = of_log_det;
    }
    for (int64_t i = 0; i < n; ++i) {
      const T of_offset = args.grad_offsets[k * n + i];
      const T* const of_matrix = args.grad_matrices + (k * n + i) * n;
      const T* const row = map.matrix + i * n;
      T* const to = of_product + args.factors.permutation[k][i] * n;
      for (int64_t j = 0; j < n; ++j) {
        const T grad = of_matrix[j] + of_offset * bias[j];
        of_bias[j] += row[j] * of_offset;
        of_log_scale[j] += grad * row[j];
        to[j] = grad * map.scale[j];
      }
    }
    for (int64_t i = 0; i < n * n; ++i) of_upper[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T* const row = of_product + i * n;
      for (int64_t t = 0; t < n; ++t) {
        T sum = 0;
        if (t < i) {
          for (int64_t j = 0; j < n; ++j) sum += row[j] * map.upper[t * n + j];
        }
        of_lower[i * n + t] = sum;
      }
      for (int64_t t = 0; t <= i; ++t) {  // U^T of L^T times the product's gradient; L has ones on its diagonal
        const T factor = t < i ? lower[i * n + t] : T(1);
        for (int64_t j = 0; j < n; ++j) of_upper[t * n + j] += factor * row[j];
      }
    }
    for (int64_t t = 0; t < n; ++t) {
      of_log_diag[t] = of_upper[t * n + t] * map.diagonal[t] + of_log_det;
      for (int64_t j = 0; j <= t; ++j) of_upper[t * n + j] = 0;
    }
  });
}

PYGLOW_CPU_INSTANTIATE(fold, FoldArgs)
PYGLOW_CPU_INSTANTIATE(fold_backward, FoldBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
