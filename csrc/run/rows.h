// Nets as the library's matrix products over rows, one of each position of each sample. With P what each position sees
// of the input (op patches), T what it gives to each tap of the last layer, and a sum of those (op tap_sums):
//
//   h_1 = a(P W_1' + b_1),  h_l = a(h_(l-1) W_l' + b_l),  T = h_(L-1) W_L',  out = sum of T's shifted taps + b_L
//
// and backward the same in turn, as patches and tap_sums are each other's transpose. W_1 is the weight as torch has it,
// W_L one that is channels-last: matrices as they lie in memory, but for rows that begin at 16 bytes.
#pragma once
#include "run/net.h"

namespace pyglow::run {

// Whether a net of these tensors can run by rows: only its first and last layers see more than their position.
bool goes_by_rows(const NetForm& form, at::TensorList tensors);

// Whether channels-last weights (out, in, *kernel) of this dtype are the matrices already, without a copy.
bool is_matrix(const Tensor& weight, at::ScalarType dtype, bool first);
// The weights of one layer and size as matrices: of the first layer (out, in taps), of others (out taps, in).
Tensors matrices_of(const Tensors& weights, at::ScalarType dtype, bool first);
std::vector<int64_t> matrix_sizes(at::IntArrayRef weight, bool first);

}  // namespace pyglow::run
