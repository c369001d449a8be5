// Inverses and determinants of the matrices of channel mixings.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <tuple>

#include "bindings/checks.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {

// The inverse of each matrix of a stack, and log|det|.
std::tuple<at::Tensor, at::Tensor> invert_matrices(const at::Tensor& matrices_in) {
  TORCH_CHECK_VALUE(matrices_in.dim() == 3 && matrices_in.size(1) == matrices_in.size(2),
                    "matrices: expected shape (K, C, C), found ", matrices_in.sizes());
  check_state("matrices", matrices_in);
  const at::Tensor matrices = matrices_in.contiguous();
  at::Tensor inverses = at::empty_like(matrices), log_dets = empty_reused({matrices.size(0)}, matrices.options());
  with_dtype(matrices, [&](auto zero) {
    using T = decltype(zero);
    const InvertMatricesArgs<T> args{.matrices = matrices.const_data_ptr<T>(),
                                     .inverses = inverses.mutable_data_ptr<T>(),
                                     .log_dets = log_dets.mutable_data_ptr<T>(),
                                     .count = matrices.size(0),
                                     .channels = matrices.size(1)};
    run(matrices, args);
  });
  return {inverses, log_dets};
}

void register_matrix_ops(torch::Library& m) { m.impl("invert_matrices", &invert_matrices); }

}  // namespace pyglow::bindings
