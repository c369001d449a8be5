// CPU schedule of the channel maps that actnorms and convolutions in LU factors are folded into: a map at a time, row
// by row, in double, so that each number is rounded once; compiled once per instruction set.
#include "core.h"
#include "cpu/isa.h"
#include "cpu/tiles.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

// One map's factors as tables, and the product that its matrix is made of.
struct Tables {
  double *upper, *product, *matrix;  // (C, C)
  double *diagonal, *scale;          // (C,)
  int64_t channels;

  static int64_t bytes(int64_t channels) {
    return (3 * channels * channels + 2 * channels) * static_cast<int64_t>(sizeof(double));
  }
  Tables(void* memory, int64_t channels) : channels(channels) {
    upper = static_cast<double*>(memory);
    product = upper + channels * channels;
    matrix = product + channels * channels;
    diagonal = matrix + channels * channels;
    scale = diagonal + channels;
  }

  template <class T>
  void fold(const Factors<T>& factors, int64_t k) {
    const int64_t n = channels;
    const T *lower = factors.lower[k], *given = factors.upper[k];
    for (int64_t i = 0; i < n; ++i) {
      diagonal[i] = factors.sign_diag[k][i] * math::exp(static_cast<double>(factors.log_diag[k][i]));
      scale[i] = math::exp(static_cast<double>(factors.log_scale[k][i]));
      for (int64_t j = 0; j < n; ++j) upper[i * n + j] = j > i ? static_cast<double>(given[i * n + j]) : 0;
      upper[i * n + i] = diagonal[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      double* const row = product + i * n;
      for (int64_t j = 0; j < n; ++j) row[j] = upper[i * n + j];
      for (int64_t t = 0; t < i; ++t) {
        const double factor = lower[i * n + t];
        for (int64_t j = 0; j < n; ++j) row[j] += factor * upper[t * n + j];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double* const from = product + factors.permutation[k][i] * n;
      for (int64_t j = 0; j < n; ++j) matrix[i * n + j] = from[j] * scale[j];
    }
  }
};

template <class T>
void each_map(const Factors<T>& factors, const Threads& threads, int64_t rows, auto&& body) {
  const int64_t n = factors.channels, room = Tables::bytes(n) + rows * n * static_cast<int64_t>(sizeof(double));
  parallel(threads, factors.count, grain_of(n * n * n), [&](int64_t begin, int64_t end) {
    void* const memory = thread_scratch(Scratch::tile, static_cast<std::size_t>(room) + 1);
    Tables map(memory, n);
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
  each_map(args.factors, threads, 0, [&](int64_t k, const Tables& map, double*) {
    const T* const bias = args.factors.bias[k];
    double log_det = 0;
    for (int64_t i = 0; i < n; ++i) {
      double offset = 0;
      for (int64_t j = 0; j < n; ++j) {
        args.matrices[(k * n + i) * n + j] = static_cast<T>(map.matrix[i * n + j]);
        offset += map.matrix[i * n + j] * static_cast<double>(bias[j]);
      }
      args.offsets[k * n + i] = static_cast<T>(offset);
      log_det += static_cast<double>(args.factors.log_diag[k][i]) + static_cast<double>(args.factors.log_scale[k][i]);
    }
    args.log_dets[k] = static_cast<T>(log_det);
  });
}

template <class T>
void fold_backward(const FoldBackwardArgs<T>& args, const Threads& threads) {
  const int64_t n = args.factors.channels;
  each_map(args.factors, threads, 2 * n + 2, [&](int64_t k, const Tables& map, double* of_product) {
    const T* const lower = args.factors.lower[k];
    const T* const bias = args.factors.bias[k];
    const double of_log_det = args.grad_log_dets[k];
    double *of_upper = of_product + n * n, *of_bias = of_upper + n * n, *of_log_scale = of_bias + n;
    for (int64_t j = 0; j < n; ++j) {
      of_bias[j] = 0;
      of_log_scale[j] = of_log_det;
    }
    for (int64_t i = 0; i < n; ++i) {
      const double of_offset = args.grad_offsets[k * n + i];
      const T* const of_matrix = args.grad_matrices + (k * n + i) * n;
      const double* const row = map.matrix + i * n;
      double* const to = of_product + args.factors.permutation[k][i] * n;
      for (int64_t j = 0; j < n; ++j) {
        const double grad = of_matrix[j] + of_offset * bias[j];
        of_bias[j] += row[j] * of_offset;
        of_log_scale[j] += grad * row[j];
        to[j] = grad * map.scale[j];
      }
    }
    for (int64_t i = 0; i < n * n; ++i) of_upper[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double* const row = of_product + i * n;
      for (int64_t t = 0; t < n; ++t) {
        double sum = 0;
        if (t < i) {
          for (int64_t j = 0; j < n; ++j) sum += row[j] * map.upper[t * n + j];
        }
        args.grad_lower[(k * n + i) * n + t] = static_cast<T>(sum);
      }
      for (int64_t t = 0; t <= i; ++t) {  // L^T times the product's gradient; L has ones on its diagonal
        const double factor = t < i ? static_cast<double>(lower[i * n + t]) : 1;
        for (int64_t j = 0; j < n; ++j) of_upper[t * n + j] += factor * row[j];
      }
    }
    for (int64_t t = 0; t < n; ++t) {
      args.grad_log_diag[k * n + t] = static_cast<T>(of_upper[t * n + t] * map.diagonal[t] + of_log_det);
      args.grad_log_scale[k * n + t] = static_cast<T>(of_log_scale[t]);
      args.grad_bias[k * n + t] = static_cast<T>(of_bias[t]);
      for (int64_t j = 0; j < n; ++j)
        args.grad_upper[(k * n + t) * n + j] = static_cast<T>(j > t ? of_upper[t * n + j] : 0);
    }
  });
}

PYGLOW_CPU_INSTANTIATE(fold, FoldArgs)
PYGLOW_CPU_INSTANTIATE(fold_backward, FoldBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
