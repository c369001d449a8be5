#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <memory>

#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "run/steps.h"

namespace pyglow::run {
namespace {

// Of the tensors of each parameter, which are held for as long as they are read.
template <class T>
class Addresses {
 public:
  explicit Addresses(const Factors& of)
      : count_(static_cast<int64_t>(of.lower.size())),
        channels_(of.lower[0].size(0)),
        table_(std::make_shared<std::vector<int64_t>>(7 * count_)) {
    put<int64_t>(0, of.permutation);
    put<T>(1, of.lower);
    put<T>(2, of.upper);
    put<T>(3, of.log_diag);
    put<T>(4, of.sign_diag);
    put<T>(5, of.log_scale);
    put<T>(6, of.bias);
  }
  // What the kernel's arguments point to besides tensors.
  const auto& table() const { return table_; }
  pyglow::Factors<T> factors() const {
    return {row<int64_t>(0), row<T>(1), row<T>(2), row<T>(3), row<T>(4), row<T>(5), row<T>(6), count_, channels_};
  }

 private:
  template <class U>
  void put(int64_t row, at::TensorList tensors) {
    int64_t* const to = table_->data() + row * count_;
    for (int64_t k = 0; k < count_; ++k) {
      held_.push_back(tensors[k].contiguous());
      to[k] = reinterpret_cast<int64_t>(held_.back().const_data_ptr<U>());
    }
  }
  template <class U>
  const U* const* row(int64_t i) const {
    return reinterpret_cast<const U* const*>(table_->data() + i * count_);
  }

  int64_t count_, channels_;
  std::shared_ptr<std::vector<int64_t>> table_;
  Tensors held_;
};

// Shapes, dtypes and devices; on the CPU that the permutations name rows.
void check(const Factors& of) {
  TORCH_CHECK_VALUE(!of.lower.empty(), "raw: expected tensors of at least one step, found none");
  const Tensor& like = of.lower[0];
  bindings::check_state("lower", like);
  const int64_t channels = like.size(0);
  for (std::size_t k = 0; k < of.lower.size(); ++k) {
    bindings::check_matrix("lower", of.lower[k], "lower", like, channels);
    bindings::check_matrix("upper", of.upper[k], "lower", like, channels);
    bindings::check_vector("log_diag", of.log_diag[k], "lower", like, channels);
    bindings::check_vector("sign_diag", of.sign_diag[k], "lower", like, channels);
    bindings::check_vector("log_scale", of.log_scale[k], "lower", like, channels);
    bindings::check_vector("bias", of.bias[k], "lower", like, channels);
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

}  // namespace

Maps fold(const Factors& factors) {
  const Plain plain;
  check(factors);
  const Tensor& like = factors.lower[0];
  const auto count = static_cast<int64_t>(factors.lower.size()), channels = like.size(0);
  Tensor matrices = at::empty({count, channels, channels}, like.options());
  Tensor offsets = at::empty({count, channels}, like.options()), log_dets = at::empty({count}, like.options());
  bindings::with_dtype(like, [&]<class T>(T) {
    if (like.is_meta()) return;
    const Addresses<T> own(factors);
    bindings::run(like,
                  FoldArgs<T>{own.factors(), matrices.mutable_data_ptr<T>(), offsets.mutable_data_ptr<T>(),
                              log_dets.mutable_data_ptr<T>()},
                  own.table());
  });
  return {matrices, offsets, log_dets, {}};
}

Tensors fold_backward(const Factors& factors, const Tensor& grad_matrices, const Tensor& grad_offsets,
                      const Tensor& grad_log_dets) {
  const Plain plain;
  check(factors);
  const Tensor& like = factors.lower[0];
  const auto count = static_cast<int64_t>(factors.lower.size()), channels = like.size(0);
  bindings::check_shape("matrices", grad_matrices, {count, channels, channels});
  bindings::check_shape("offsets", grad_offsets, {count, channels});
  bindings::check_shape("log_dets", grad_log_dets, {count});
  for (const Tensor* grad : {&grad_matrices, &grad_offsets, &grad_log_dets})
    bindings::check_like("gradients", *grad, "lower", like);
  const Tensor matrices = grad_matrices.contiguous(), offsets = grad_offsets.contiguous();
  const Tensor log_dets = grad_log_dets.contiguous();
  const Tensors stacked{at::empty_like(offsets), at::empty_like(offsets), at::empty_like(matrices),
                        at::empty_like(matrices), at::empty_like(offsets)};
  bindings::with_dtype(matrices, [&]<class T>(T) {
    if (matrices.is_meta()) return;
    const Addresses<T> own(factors);
    const auto out = [&](std::size_t i) { return stacked[i].mutable_data_ptr<T>(); };
    bindings::run(matrices,
                  FoldBackwardArgs<T>{own.factors(), matrices.const_data_ptr<T>(), offsets.const_data_ptr<T>(),
                                      log_dets.const_data_ptr<T>(), out(2), out(3), out(4), out(0), out(1)},
                  own.table());
  });
  return stacked;
}

}  // namespace pyglow::run
