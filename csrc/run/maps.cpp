#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <array>

#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "bindings/dry.h"
#include "run/steps.h"

namespace pyglow::run {
namespace {

// W = P L U by rows gathered; L with ones, U with sign exp(log_diag) on the diagonal.
struct Folded {
  Tensor lower, upper, permutation, diagonal, scale, bias, matrix;

  explicit Folded(const Factors& factors) : rounds(factors.rounds) {
    lower = at::stack(factors.lower).tril(-1);
    lower.diagonal(0, -2, -1).fill_(1);
    diagonal = at::stack(factors.sign_diag) * at::stack(factors.log_diag).exp();
    upper = at::stack(factors.upper).triu(1);
    upper.diagonal(0, -2, -1).copy_(diagonal);
    const Tensor factored = product(lower, upper);
    permutation = at::stack(factors.permutation).unsqueeze(-1).expand_as(factored);
    scale = at::stack(factors.log_scale).exp().unsqueeze(-2);
    bias = at::stack(factors.bias);
    matrix = factored.gather(-2, permutation) * scale;
  }

  // In float64 where torch's settings let float32 products round.
  Tensor product(const Tensor& a, const Tensor& b) const {
    if (!rounds) return at::matmul(a, b);
    return at::matmul(a.to(at::kDouble), b.to(at::kDouble)).to(a.scalar_type());
  }

  bool rounds;
};

// Pointers to the tensors of each parameter, which are held for as long as they are read. They lie in a tensor, as all
// that a kernel reads.
template <class T>
class OnCpu {
 public:
  explicit OnCpu(const Factors& of)
      : count_(static_cast<int64_t>(of.lower.size())),
        channels_(of.lower[0].size(0)),
        table_(at::empty({7, count_}, at::kLong)) {
    put<int64_t>(0, of.permutation);
    put<T>(1, of.lower);
    put<T>(2, of.upper);
    put<T>(3, of.log_diag);
    put<T>(4, of.sign_diag);
    put<T>(5, of.log_scale);
    put<T>(6, of.bias);
  }
  pyglow::Factors<T> factors() const {
    return {row<int64_t>(0), row<T>(1), row<T>(2), row<T>(3), row<T>(4), row<T>(5), row<T>(6), count_, channels_};
  }

 private:
  template <class U>
  void put(int64_t row, at::TensorList tensors) {
    int64_t* const to = table_.mutable_data_ptr<int64_t>() + row * count_;
    for (int64_t k = 0; k < count_; ++k) {
      held_.push_back(tensors[k].contiguous());
      to[k] = reinterpret_cast<int64_t>(held_.back().const_data_ptr<U>());
    }
  }
  template <class U>
  const U* const* row(int64_t i) const {
    return reinterpret_cast<const U* const*>(table_.const_data_ptr<int64_t>() + i * count_);
  }

  int64_t count_, channels_;
  Tensor table_;
  Tensors held_;
};

// Shapes, dtypes and devices; on the CPU that the permutations name rows.
void check(const Factors& of) {
  const Tensor& like = of.lower[0];
  bindings::check_state("lower", like);
  const int64_t channels = like.size(0);
  for (std::size_t k = 0; k < of.lower.size(); ++k) {
    for (const auto& [name, one] : {std::pair("lower", of.lower[k]), std::pair("upper", of.upper[k])})
      bindings::check_matrix(name, one, "lower", like, channels);
    for (const auto& [name, one] : {std::pair("log_diag", of.log_diag[k]), std::pair("sign_diag", of.sign_diag[k]),
                                    std::pair("log_scale", of.log_scale[k]), std::pair("bias", of.bias[k])})
      bindings::check_vector(name, one, "lower", like, channels);
    const Tensor& rows = of.permutation[k];
    bindings::check_shape("permutation", rows, {channels});
    TORCH_CHECK_VALUE(rows.scalar_type() == at::kLong && rows.device() == like.device(),
                      "permutation: expected int64 on ", like.device(), ", found ", rows.scalar_type(), " on ",
                      rows.device());
    if (!rows.is_cpu()) continue;
    const Tensor held = rows.contiguous();
    for (int64_t i = 0; i < channels; ++i)
      TORCH_CHECK_VALUE(held.const_data_ptr<int64_t>()[i] >= 0 && held.const_data_ptr<int64_t>()[i] < channels,
                        "permutation: expected rows from 0 to ", channels - 1, ", found ",
                        held.const_data_ptr<int64_t>()[i]);
  }
}

Maps fold_on_cpu(const Factors& of) {
  const Tensor& like = of.lower[0];
  const auto count = static_cast<int64_t>(of.lower.size()), channels = like.size(0);
  Tensor matrices = at::empty({count, channels, channels}, like.options());
  Tensor offsets = at::empty({count, channels}, like.options()), log_dets = at::empty({count}, like.options());
  bindings::with_dtype(like, [&](auto zero) {
    using T = decltype(zero);
    if (!like.is_cpu()) return;
    const OnCpu<T> own(of);
    cpu::fold(FoldArgs<T>{own.factors(), matrices.mutable_data_ptr<T>(), offsets.mutable_data_ptr<T>(),
                          log_dets.mutable_data_ptr<T>()},
              bindings::torch_threads());
  });
  return {matrices, offsets, log_dets, {}};
}

// Stacked: of log_scale, bias, lower, upper and log_diag.
std::array<Tensor, 5> fold_backward_on_cpu(const Factors& of, const Tensor& grad_matrices, const Tensor& grad_offsets,
                                           const Tensor& grad_log_dets) {
  const Tensor matrices = grad_matrices.contiguous(), offsets = grad_offsets.contiguous();
  const Tensor log_dets = grad_log_dets.contiguous();
  std::array<Tensor, 5> found{at::empty_like(offsets), at::empty_like(offsets), at::empty_like(matrices),
                              at::empty_like(matrices), at::empty_like(offsets)};
  bindings::with_dtype(matrices, [&](auto zero) {
    using T = decltype(zero);
    if (!matrices.is_cpu()) return;
    const OnCpu<T> own(of);
    const auto out = [&](std::size_t i) { return found[i].mutable_data_ptr<T>(); };
    cpu::fold_backward(FoldBackwardArgs<T>{own.factors(), matrices.const_data_ptr<T>(), offsets.const_data_ptr<T>(),
                                           log_dets.const_data_ptr<T>(), out(2), out(3), out(4), out(0), out(1)},
                       bindings::torch_threads());
  });
  return found;
}

// Also in a dry run.
bool is_for_cpu(const Factors& of) {
  return of.lower[0].is_cpu() || (of.lower[0].is_meta() && !bindings::stands_for_gpu());
}

}  // namespace

Maps fold(const Factors& factors) {
  const Plain plain;
  check(factors);
  if (is_for_cpu(factors)) return fold_on_cpu(factors);
  const Folded folded(factors);
  const Tensor offsets = folded.product(folded.matrix, folded.bias.unsqueeze(-1)).squeeze(-1);
  const Tensor log_dets = at::stack(factors.log_diag).sum(-1) + at::stack(factors.log_scale).sum(-1);
  return {folded.matrix, offsets, log_dets, {}};
}

// On a GPU, by torch's batched ops.
std::array<Tensor, 5> fold_backward_batched(const Factors& factors, const Tensor& grad_matrices,
                                            const Tensor& grad_offsets, const Tensor& grad_log_dets) {
  const Folded folded(factors);
  const Tensor of_log_dets = grad_log_dets.unsqueeze(-1);
  const Tensor grad = grad_matrices + grad_offsets.unsqueeze(-1) * folded.bias.unsqueeze(-2);
  const Tensor of_bias = folded.product(folded.matrix.mT(), grad_offsets.unsqueeze(-1)).squeeze(-1);
  const Tensor of_log_scale = (grad * folded.matrix).sum(-2) + of_log_dets;
  const Tensor weighted = grad * folded.scale;
  const Tensor of_product = at::zeros_like(weighted).scatter_(-2, folded.permutation, weighted);
  const Tensor of_lower = folded.product(of_product, folded.upper.mT()).tril(-1);
  const Tensor whole_upper = folded.product(folded.lower.mT(), of_product);
  const Tensor of_log_diag = whole_upper.diagonal(0, -2, -1) * folded.diagonal + of_log_dets;
  return {of_log_scale, of_bias, of_lower, whole_upper.triu(1), of_log_diag};
}

Tensors fold_backward(const Factors& factors, const Tensor& grad_matrices, const Tensor& grad_offsets,
                      const Tensor& grad_log_dets) {
  const Plain plain;
  const auto backward = is_for_cpu(factors) ? &fold_backward_on_cpu : &fold_backward_batched;
  Tensors found;
  for (const Tensor& stacked : backward(factors, grad_matrices, grad_offsets, grad_log_dets))
    for (const Tensor& one : stacked.unbind()) found.push_back(one);
  return found;
}

}  // namespace pyglow::run
