// The passes that join a coupling with a channel mixing; with an index that is a gather, see step_ops.cpp.
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {

// M couple(x) + c and log_det; inverse: A (uncouple(x) - c) and its log_det, with matrix A = M^-1.
std::tuple<Tensor, Tensor> coupling_mix(const Tensor& x_in, const Tensor& net_out_in, const Tensor& matrix_in,
                                        const Tensor& offset_in, const Kind& kind, const Optional& index) {
  check_state("x", x_in);
  const int64_t transformed = check_net_out(net_out_in, "x", x_in, kind);
  const MapTensors mix("matrix", matrix_in, index, "x", x_in, x_in.size(1));
  check_vector("offset", offset_in, "x", x_in, x_in.size(1));
  const Tensor x = with_position_stride(x_in), net_out = with_position_stride(net_out_in);
  const Tensor offset = offset_in.contiguous();
  Tensor out = empty_output(x), log_det = empty_reused({x.size(0)}, x.options());
  with_dtype(x, [&]<class T>(T) {
    if (mix.gathers()) {
      const GatherArgs<T> args{.in = {input<T>(x), 0, 0},
                               .net_out = net_input(net_out),
                               .map = kind.inverse ? mix.gather<T>({}, offset) : mix.gather<T>(offset, {}),
                               .out = {output<T>(out), 0, 0},
                               .log_det = log_det.mutable_data_ptr<T>(),
                               .samples = x.size(0),
                               .channels = x.size(1),
                               .transformed = transformed,
                               .positions = positions_of(x),
                               .kind = kind.as<T>()};
      return run(x, args);
    }
    const CouplingMixArgs<T> args{.coupling = coupling_args<T>(x, net_out, out, log_det, transformed, kind),
                                  .matrix = mix.matrix.const_data_ptr<T>(),
                                  .offset = offset.const_data_ptr<T>()};
    run(x, args);
  });
  check_overflow(kind, log_det);
  return {out, log_det};
}

// grad_x (without the net's part), grad_net_out, grad_M and grad_c of M couple(x) + c.
std::tuple<Tensor, Tensor, Tensor, Tensor> coupling_mix_backward(const Tensor& x_in, const Tensor& net_out_in,
                                                                 const Tensor& grad_out_in,
                                                                 const Tensor& grad_log_det_in, const Tensor& matrix_in,
                                                                 const Kind& kind, const Optional& added_in,
                                                                 const Optional& index) {
  check_state("x", x_in);
  const int64_t transformed = check_net_out(net_out_in, "x", x_in, kind);
  check_output_grads("grad_out", grad_out_in, grad_log_det_in, "x", x_in);
  const MapTensors mix("matrix", matrix_in, index, "x", x_in, x_in.size(1));
  const Tensor added = check_added(added_in, "grad_out", grad_out_in);
  const Tensor x = with_position_stride(x_in), net_out = with_position_stride(net_out_in);
  const Tensor grad_out = with_position_stride(grad_out_in), grad_log_det = grad_log_det_in.contiguous();
  Tensor grad_x = empty_output(x), grad_net_out = empty_output(net_out);
  Tensor grad_matrix = empty_reused(mix.matrix.sizes(), mix.matrix.options()),
         grad_offset = empty_reused({x.size(1)}, x.options());
  with_dtype(x, [&]<class T>(T) {
    if (mix.gathers()) {
      const GatherBackwardArgs<T> args{.in = {input<T>(x), 0, 0},
                                       .net_out = net_input(net_out),
                                       .grad_out = split_grad<T>(grad_out, added),
                                       .grad_log_det = grad_log_det.const_data_ptr<T>(),
                                       .map = mix.gather<T>({}, {}),
                                       .grad_in = {output<T>(grad_x), 0, 0},
                                       .grad_net_out = net_grad(grad_net_out),
                                       .grad_scale = grad_matrix.mutable_data_ptr<T>(),
                                       .grad_offset = grad_offset.mutable_data_ptr<T>(),
                                       .samples = x.size(0),
                                       .channels = x.size(1),
                                       .transformed = transformed,
                                       .positions = positions_of(x),
                                       .kind = kind.as<T>()};
      return run(x, args);
    }
    const CouplingMixBackwardArgs<T> args{.in = input<T>(x),
                                          .net_out = net_input(net_out),
                                          .grad_out = split_grad<T>(grad_out, added),
                                          .grad_log_det = grad_log_det.const_data_ptr<T>(),
                                          .matrix = mix.matrix.const_data_ptr<T>(),
                                          .grad_in = output<T>(grad_x),
                                          .grad_net_out = net_grad(grad_net_out),
                                          .grad_matrix = grad_matrix.mutable_data_ptr<T>(),
                                          .grad_offset = grad_offset.mutable_data_ptr<T>(),
                                          .samples = x.size(0),
                                          .channels = x.size(1),
                                          .transformed = transformed,
                                          .positions = positions_of(x),
                                          .kind = kind.as<T>()};
    run(x, args);
  });
  return {grad_x, grad_net_out, grad_matrix, grad_offset};
}

// From a step's output y: its input x, grad_u (without the net's part) and grad_net_out.
std::tuple<Tensor, Tensor, Tensor> step_backward(const Tensor& y_in, const Tensor& net_out_in, const Tensor& grad_y_in,
                                                 const Tensor& grad_log_det_in, const Tensor& inverse_matrix_in,
                                                 const Tensor& offset_in, const Kind& kind, const Optional& index) {
  check_state("y", y_in);
  const int64_t transformed = check_net_out(net_out_in, "y", y_in, kind);
  check_output_grads("grad_y", grad_y_in, grad_log_det_in, "y", y_in);
  const MapTensors unmix("inverse_matrix", inverse_matrix_in, index, "y", y_in, y_in.size(1));
  check_vector("offset", offset_in, "y", y_in, y_in.size(1));
  const Tensor y = with_position_stride(y_in), net_out = with_position_stride(net_out_in);
  const Tensor grad_y = with_position_stride(grad_y_in), grad_log_det = grad_log_det_in.contiguous();
  const Tensor offset = offset_in.contiguous();
  Tensor x = empty_output(y), grad_u = empty_output(y), grad_net_out = empty_output(net_out);
  with_dtype(y, [&]<class T>(T) {
    if (unmix.gathers()) {
      const StepGatherBackwardArgs<T> args{.y = input<T>(y),
                                           .net_out = net_input(net_out),
                                           .grad_y = input<T>(grad_y),
                                           .grad_log_det = grad_log_det.const_data_ptr<T>(),
                                           .map = unmix.gather<T>({}, offset),
                                           .x = output<T>(x),
                                           .grad_u = output<T>(grad_u),
                                           .grad_net_out = net_grad(grad_net_out),
                                           .samples = y.size(0),
                                           .channels = y.size(1),
                                           .transformed = transformed,
                                           .positions = positions_of(y),
                                           .kind = kind.as<T>()};
      return run(y, args);
    }
    const StepBackwardArgs<T> args{.y = input<T>(y),
                                   .net_out = net_input(net_out),
                                   .grad_y = input<T>(grad_y),
                                   .grad_log_det = grad_log_det.const_data_ptr<T>(),
                                   .inverse_matrix = unmix.matrix.const_data_ptr<T>(),
                                   .offset = offset.const_data_ptr<T>(),
                                   .x = output<T>(x),
                                   .grad_u = output<T>(grad_u),
                                   .grad_net_out = net_grad(grad_net_out),
                                   .samples = y.size(0),
                                   .channels = y.size(1),
                                   .transformed = transformed,
                                   .positions = positions_of(y),
                                   .kind = kind.as<T>()};
    run(y, args);
  });
  return {x, grad_u, grad_net_out};
}

void register_fused_ops(torch::Library& m) {
  m.impl("coupling_mix",
         [](const Tensor& x, const Tensor& net_out, const Tensor& matrix, const Tensor& offset, int64_t map,
            int64_t order, bool inverse, double bias, double eps, double clamp, double factor, const Optional& index) {
           return coupling_mix(x, net_out, matrix, offset, {map, order, inverse, bias, eps, clamp, factor}, index);
         });
  m.impl("coupling_mix_backward",
         [](const Tensor& x, const Tensor& net_out, const Tensor& grad_out, const Tensor& grad_log_det,
            const Tensor& matrix, int64_t map, int64_t order, double bias, double eps, double clamp, double factor,
            const Optional& added, const Optional& index) {
           const Kind kind{map, order, false, bias, eps, clamp, factor};
           return coupling_mix_backward(x, net_out, grad_out, grad_log_det, matrix, kind, added, index);
         });
  m.impl("step_backward", [](const Tensor& y, const Tensor& net_out, const Tensor& grad_y, const Tensor& grad_log_det,
                             const Tensor& inverse_matrix, const Tensor& offset, int64_t map, int64_t order,
                             double bias, double eps, double clamp, double factor, const Optional& index) {
    const Kind kind{map, order, false, bias, eps, clamp, factor};
    return step_backward(y, net_out, grad_y, grad_log_det, inverse_matrix, offset, kind, index);
  });
}

}  // namespace pyglow::bindings
