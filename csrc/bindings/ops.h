// The ops on tensors, file by file: what the module's entry registers with the dispatcher, and what csrc/run calls.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace pyglow::bindings {

void register_step_ops(torch::Library& m);
void register_fused_ops(torch::Library& m);
void register_statistics_ops(torch::Library& m);
// For CPU tensors alone:
void register_net_ops(torch::Library& m);
void register_checkerboard_ops(torch::Library& m);

using Optional = std::optional<at::Tensor>;

// Each is described where it is defined; schemas and shapes are in pyglow_fast/ops.py.
at::Tensor channel_mix(const at::Tensor& x, const at::Tensor& matrix, const at::Tensor& offset, bool subtract_first,
                       int64_t squeeze, const Optional& index);
std::tuple<at::Tensor, at::Tensor, at::Tensor> channel_mix_backward(const at::Tensor& x, const at::Tensor& grad_u,
                                                                    const at::Tensor& matrix, const Optional& center,
                                                                    const Optional& added, bool squeezes,
                                                                    const Optional& index);
std::tuple<at::Tensor, at::Tensor> coupling(const at::Tensor& x, const at::Tensor& net_out, int64_t map, int64_t order,
                                            bool inverse, double bias, double eps, double clamp, double factor);
std::tuple<at::Tensor, at::Tensor, at::Tensor> coupling_backward(const at::Tensor& out, const at::Tensor& net_out,
                                                                 const at::Tensor& grad_out,
                                                                 const at::Tensor& grad_log_det, int64_t map,
                                                                 int64_t order, bool inverse, double bias, double eps,
                                                                 double clamp, double factor, bool want_input);
std::tuple<at::Tensor, at::Tensor> coupling_mix(const at::Tensor& x, const at::Tensor& net_out,
                                                const at::Tensor& matrix, const at::Tensor& offset, int64_t map,
                                                int64_t order, bool inverse, double bias, double eps, double clamp,
                                                double factor, const Optional& index);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> coupling_mix_backward(
    const at::Tensor& x, const at::Tensor& net_out, const at::Tensor& grad_out, const at::Tensor& grad_log_det,
    const at::Tensor& matrix, int64_t map, int64_t order, double bias, double eps, double clamp, double factor,
    const Optional& added, const Optional& index);
std::tuple<at::Tensor, at::Tensor, at::Tensor> step_backward(const at::Tensor& y, const at::Tensor& net_out,
                                                             const at::Tensor& grad_y, const at::Tensor& grad_log_det,
                                                             const at::Tensor& inverse_matrix, const at::Tensor& offset,
                                                             int64_t map, int64_t order, double bias, double eps,
                                                             double clamp, double factor, const Optional& index);
std::tuple<at::Tensor, at::Tensor> invert_matrices(const at::Tensor& matrices);
std::tuple<at::Tensor, at::Tensor> net_chain(const at::Tensor& x, const Optional& cond, at::TensorList weights,
                                             at::TensorList biases, const Optional& log_gain,
                                             at::IntArrayRef activations, at::ArrayRef<double> parameters,
                                             at::IntArrayRef dilations, bool half, bool keep);
std::vector<at::Tensor> net_chain_backward(const at::Tensor& grad_out, const at::Tensor& x, const Optional& cond,
                                           const at::Tensor& kept, at::TensorList weights, const Optional& last_bias,
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

at::Tensor checkerboard_split(const at::Tensor& x, int64_t parity, bool both);
at::Tensor checkerboard_merge(const at::Tensor& halves, int64_t parity, bool both);

}  // namespace pyglow::bindings
