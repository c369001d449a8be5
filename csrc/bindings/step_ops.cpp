// Channel mixing, its inverse and coupling: tensors in, checked, made into the plain arguments of core.h, and sent to
// the kernel of their device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

#include <optional>
#include <tuple>

#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {

// u = M x + c, or u = M (x - c); x may be squeezed on the way in, or u unsqueezed on the way out. With an index M has
// the scale i, matrix_i, at [i, index_i] and nothing elsewhere.
Tensor channel_mix(const Tensor& x_in, const Tensor& matrix_in, const Tensor& offset_in, bool subtract_first,
                   int64_t squeeze_code, const Optional& index) {
  check_state("x", x_in);
  const Squeeze squeeze = check_squeeze(squeeze_code, x_in);
  const bool squeezes = squeeze == Squeeze::input, unsqueezes = squeeze == Squeeze::output;
  const int64_t channels = squeezes ? 4 * x_in.size(1) : x_in.size(1);
  const MapTensors map("matrix", matrix_in, index, "x", x_in, channels);
  check_vector("offset", offset_in, "x", x_in, channels);
  const Tensor x = squeezes ? x_in : with_position_stride(x_in);
  const Tensor offset = offset_in.contiguous();
  Tensor u = squeezes     ? empty_output(x, squeezed_sizes(x))
             : unsqueezes ? empty_output(x, unsqueezed_sizes(x))
                          : empty_output(x);
  with_dtype(x, [&]<class T>(T) {
    const auto in = squeezes ? squeezed_input<T>(x) : Squeezed<const T>{input<T>(x), 0, 0};
    const auto out = unsqueezes ? squeezed_output<T>(u) : Squeezed<T>{output<T>(u), 0, 0};
    const int64_t positions = squeezes ? positions_of(u) : positions_of(x);
    if (map.gathers()) {
      const GatherArgs<T> args{.in = in,
                               .net_out = {},
                               .map = subtract_first ? map.gather<T>({}, offset) : map.gather<T>(offset, {}),
                               .out = out,
                               .log_det = nullptr,
                               .samples = x.size(0),
                               .channels = channels,
                               .transformed = 0,
                               .positions = positions,
                               .kind = {}};
      return run(x, args);
    }
    const ChannelMixArgs<T> args{.x = in,
                                 .matrix = map.matrix.const_data_ptr<T>(),
                                 .offset = offset.const_data_ptr<T>(),
                                 .u = out,
                                 .samples = x.size(0),
                                 .channels = channels,
                                 .positions = positions,
                                 .subtract_first = subtract_first};
    run(x, args);
  });
  return u;
}

// grad_x, grad_M, grad_c of u = M x + c; with center, of the product with x - center. x may be squeezed on the way in,
// and grad_x unsqueezed on the way out. `added` belongs to grad_u.
std::tuple<Tensor, Tensor, Tensor> channel_mix_backward(const Tensor& x_in, const Tensor& grad_u_in,
                                                        const Tensor& matrix_in, const Optional& center_in,
                                                        const Optional& added_in, bool squeezes,
                                                        const Optional& index) {
  check_state("x", x_in);
  check_squeeze(squeezes ? 1 : 0, x_in);
  check_shape("grad_u", grad_u_in, squeezes ? at::IntArrayRef(squeezed_sizes(x_in)) : x_in.sizes());
  check_like("grad_u", grad_u_in, "x", x_in);
  const MapTensors map("matrix", matrix_in, index, "x", x_in, grad_u_in.size(1));
  if (center_in) check_vector("center", *center_in, "x", x_in, grad_u_in.size(1));
  const Tensor added = check_added(added_in, "grad_u", grad_u_in);
  const Tensor x = squeezes ? x_in : with_position_stride(x_in), grad_u = with_position_stride(grad_u_in);
  const Tensor center = center_in ? center_in->contiguous() : Tensor();
  Tensor grad_x = empty_output(x), grad_matrix = empty_reused(map.matrix.sizes(), map.matrix.options());
  Tensor grad_offset = empty_reused({grad_u.size(1)}, x.options());
  with_dtype(x, [&]<class T>(T) {
    const auto in = squeezes ? squeezed_input<T>(x) : Squeezed<const T>{input<T>(x), 0, 0};
    const auto grad_in = squeezes ? squeezed_output<T>(grad_x) : Squeezed<T>{output<T>(grad_x), 0, 0};
    if (map.gathers()) {
      const GatherBackwardArgs<T> args{.in = in,
                                       .net_out = {},
                                       .grad_out = split_grad<T>(grad_u, added),
                                       .grad_log_det = nullptr,
                                       .map = map.gather<T>({}, center),
                                       .grad_in = grad_in,
                                       .grad_net_out = {},
                                       .grad_scale = grad_matrix.mutable_data_ptr<T>(),
                                       .grad_offset = grad_offset.mutable_data_ptr<T>(),
                                       .samples = x.size(0),
                                       .channels = grad_u.size(1),
                                       .transformed = 0,
                                       .positions = positions_of(grad_u),
                                       .kind = {}};
      return run(x, args);
    }
    const ChannelMixBackwardArgs<T> args{.x = in,
                                         .grad_u = split_grad<T>(grad_u, added),
                                         .matrix = map.matrix.const_data_ptr<T>(),
                                         .center = center.defined() ? center.const_data_ptr<T>() : nullptr,
                                         .grad_x = grad_in,
                                         .grad_matrix = grad_matrix.mutable_data_ptr<T>(),
                                         .grad_offset = grad_offset.mutable_data_ptr<T>(),
                                         .samples = x.size(0),
                                         .channels = grad_u.size(1),
                                         .positions = positions_of(grad_u)};
    run(x, args);
  });
  return {grad_x, grad_matrix, grad_offset};
}

// y and log_det of the coupling, or of its inverse.
std::tuple<Tensor, Tensor> coupling(const Tensor& x_in, const Tensor& net_out_in, const Kind& kind) {
  check_state("x", x_in);
  const int64_t transformed = check_net_out(net_out_in, "x", x_in, kind);
  const Tensor x = with_position_stride(x_in), net_out = with_position_stride(net_out_in);
  Tensor out = empty_output(x), log_det = empty_reused({x.size(0)}, x.options());
  with_dtype(x, [&]<class T>(T) { run(x, coupling_args<T>(x, net_out, out, log_det, transformed, kind)); });
  check_overflow(kind, log_det);
  return {out, log_det};
}

// From the output: grad_in (without the net's part), grad_net_out, and the input if it is wanted (else empty).
std::tuple<Tensor, Tensor, Tensor> coupling_backward(const Tensor& out_in, const Tensor& net_out_in,
                                                     const Tensor& grad_out_in, const Tensor& grad_log_det_in,
                                                     const Kind& kind, bool want_input) {
  check_state("out", out_in);
  const int64_t transformed = check_net_out(net_out_in, "out", out_in, kind);
  check_output_grads("grad_out", grad_out_in, grad_log_det_in, "out", out_in);
  const Tensor out = with_position_stride(out_in), net_out = with_position_stride(net_out_in);
  const Tensor grad_out = with_position_stride(grad_out_in), grad_log_det = grad_log_det_in.contiguous();
  Tensor grad_in = empty_output(out), grad_net_out = empty_output(net_out);
  Tensor in = want_input ? empty_output(out) : empty_reused({0}, out.options());
  with_dtype(out, [&]<class T>(T) {
    const CouplingBackwardArgs<T> args{.out = input<T>(out),
                                       .net_out = net_input(net_out),
                                       .grad_out = input<T>(grad_out),
                                       .grad_log_det = grad_log_det.const_data_ptr<T>(),
                                       .in = want_input ? output<T>(in) : Strided<T>{},
                                       .grad_in = output<T>(grad_in),
                                       .grad_net_out = net_grad(grad_net_out),
                                       .samples = out.size(0),
                                       .channels = out.size(1),
                                       .transformed = transformed,
                                       .positions = positions_of(out),
                                       .kind = kind.as<T>()};
    run(out, args);
  });
  return {grad_in, grad_net_out, in};
}

// The inverse of each matrix of a stack, and log|det|.
std::tuple<Tensor, Tensor> invert_matrices(const Tensor& matrices_in) {
  TORCH_CHECK_VALUE(matrices_in.dim() == 3 && matrices_in.size(1) == matrices_in.size(2),
                    "matrices: expected shape (K, C, C), found ", matrices_in.sizes());
  check_state("matrices", matrices_in);
  const Tensor matrices = matrices_in.contiguous();
  Tensor inverses = at::empty_like(matrices), log_dets = empty_reused({matrices.size(0)}, matrices.options());
  with_dtype(matrices, [&]<class T>(T) {
    const InvertMatricesArgs<T> args{.matrices = matrices.const_data_ptr<T>(),
                                     .inverses = inverses.mutable_data_ptr<T>(),
                                     .log_dets = log_dets.mutable_data_ptr<T>(),
                                     .count = matrices.size(0),
                                     .channels = matrices.size(1)};
    run(matrices, args);
  });
  return {inverses, log_dets};
}

void register_step_ops(torch::Library& m) {
  m.impl("invert_matrices", &invert_matrices);
  m.impl("channel_mix", &channel_mix);
  m.impl("channel_mix_backward", &channel_mix_backward);
  m.impl("coupling", [](const Tensor& x, const Tensor& net_out, int64_t map, int64_t order, bool inverse, double bias,
                        double eps, double clamp, double factor) {
    return coupling(x, net_out, {map, order, inverse, bias, eps, clamp, factor});
  });
  m.impl("coupling_backward",
         [](const Tensor& out, const Tensor& net_out, const Tensor& grad_out, const Tensor& grad_log_det, int64_t map,
            int64_t order, bool inverse, double bias, double eps, double clamp, double factor, bool want_input) {
           const Kind kind{map, order, inverse, bias, eps, clamp, factor};
           return coupling_backward(out, net_out, grad_out, grad_log_det, kind, want_input);
         });
}

}  // namespace pyglow::bindings
