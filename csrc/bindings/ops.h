// The ops on tensors, file by file: what the module's entry registers with the dispatcher, and what csrc/run calls.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace pyglow::bindings {

void register_spline_ops(torch::Library& m);
void register_step_ops(torch::Library& m);
void register_fused_ops(torch::Library& m);
void register_statistics_ops(torch::Library& m);
void register_window_ops(torch::Library& m);
// For CPU tensors alone:
void register_net_ops(torch::Library& m);
void register_checkerboard_ops(torch::Library& m);

using at::Tensor;
using Optional = std::optional<Tensor>;
struct Kind;  // of a coupling

// Each is described where it is defined; schemas and shapes are in pyglow_fast/functional/ops.py.
Tensor channel_mix(const Tensor& x, const Tensor& matrix, const Tensor& offset, bool subtract_first, int64_t squeeze,
                   const Optional& index);
std::tuple<Tensor, Tensor, Tensor> channel_mix_backward(const Tensor& x, const Tensor& grad_u, const Tensor& matrix,
                                                        const Optional& center, const Optional& added, bool squeezes,
                                                        const Optional& index);
std::tuple<Tensor, Tensor> coupling(const Tensor& x, const Tensor& net_out, const Kind& kind);
std::tuple<Tensor, Tensor, Tensor> coupling_backward(const Tensor& out, const Tensor& net_out, const Tensor& grad_out,
                                                     const Tensor& grad_log_det, const Kind& kind, bool want_input);
std::tuple<Tensor, Tensor> coupling_mix(const Tensor& x, const Tensor& net_out, const Tensor& matrix,
                                        const Tensor& offset, const Kind& kind, const Optional& index);
std::tuple<Tensor, Tensor, Tensor, Tensor> coupling_mix_backward(const Tensor& x, const Tensor& net_out,
                                                                 const Tensor& grad_out, const Tensor& grad_log_det,
                                                                 const Tensor& matrix, const Kind& kind,
                                                                 const Optional& added, const Optional& index);
std::tuple<Tensor, Tensor, Tensor> step_backward(const Tensor& y, const Tensor& net_out, const Tensor& grad_y,
                                                 const Tensor& grad_log_det, const Tensor& inverse_matrix,
                                                 const Tensor& offset, const Kind& kind, const Optional& index);
std::tuple<Tensor, Tensor> invert_matrices(const Tensor& matrices);
int64_t row_length(int64_t used, at::ScalarType dtype);  // elements from one row to the next
std::tuple<Tensor, Tensor> patches(const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef dilations, bool backward,
                                   at::ScalarType dtype);
Tensor relu_backward(const Tensor& grad, const Tensor& h);
Tensor tap_sums(const Tensor& rows, const Optional& bias, at::IntArrayRef sizes, at::IntArrayRef kernel,
                at::IntArrayRef dilations, bool backward, at::ScalarType dtype);
std::tuple<Tensor, Tensor> net_chain(const Tensor& x, const Optional& cond, at::TensorList weights,
                                     at::TensorList biases, const Optional& log_gain, at::IntArrayRef activations,
                                     at::ArrayRef<double> parameters, at::IntArrayRef dilations, bool half, bool keep);
std::vector<Tensor> net_chain_backward(const Tensor& grad_out, const Tensor& x, const Optional& cond,
                                       const Tensor& kept, at::TensorList weights, const Optional& last_bias,
                                       const Optional& log_gain, at::IntArrayRef activations,
                                       at::ArrayRef<double> parameters, at::IntArrayRef dilations, bool half,
                                       bool want_weights);

// What the ops of nets say about the layers besides their weights.
struct ChainDescription {
  at::IntArrayRef activations;
  at::ArrayRef<double> parameters;
  at::IntArrayRef dilations;
  bool half;
};
void check_chain(const ChainDescription& how, std::size_t layers, int64_t dims);

Tensor checkerboard_split(const Tensor& x, int64_t parity, bool both);
Tensor checkerboard_merge(const Tensor& halves, int64_t parity, bool both);

}  // namespace pyglow::bindings
