#include <ATen/ops/diag_embed.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

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

}  // namespace

Maps fold(const Factors& factors) {
  const Plain plain;
  const Folded folded(factors);
  const Tensor offsets = folded.product(folded.matrix, folded.bias.unsqueeze(-1)).squeeze(-1);
  const Tensor log_dets = at::stack(factors.log_diag).sum(-1) + at::stack(factors.log_scale).sum(-1);
  return {folded.matrix, offsets, log_dets, {}};
}

Tensors fold_backward(const Factors& factors, const Tensor& grad_matrices, const Tensor& grad_offsets,
                      const Tensor& grad_log_dets) {
  const Plain plain;
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
  Tensors found;
  for (const Tensor& stacked : {of_lower, whole_upper.triu(1), of_log_diag, of_log_scale, of_bias})
    for (const Tensor& one : stacked.unbind()) found.push_back(one);
  return found;
}

}  // namespace pyglow::run
