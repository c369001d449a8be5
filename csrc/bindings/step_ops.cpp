// Channel mixing and coupling: tensors in, checked, made into the plain arguments of core.h, and sent to the kernel of
// their device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "bindings/coupling_kind.h"
#include "bindings/device.h"
#include "bindings/ops.h"

namespace pyglow::bindings {
namespace {

// u = M x + c, or u = M (x - c); x may be squeezed on the way in, or u unsqueezed on the way out.
at::Tensor channel_mix(const at::Tensor& x_in, const at::Tensor& matrix_in, const at::Tensor& offset_in,
                       bool subtract_first, int64_t squeeze_code) {
  check_state("x", x_in);
  const Squeeze squeeze = check_squeeze(squeeze_code, x_in);
  const bool squeezes = squeeze == Squeeze::input, unsqueezes = squeeze == Squeeze::output;
  const int64_t channels = squeezes ? 4 * x_in.size(1) : x_in.size(1);
  check_matrix("matrix", matrix_in, "x", x_in, channels);
  check_vector("offset", offset_in, "x", x_in, channels);
  const at::Tensor x = squeezes ? x_in : with_position_stride(x_in);
  const at::Tensor matrix = matrix_in.contiguous(), offset = offset_in.contiguous();
  at::Tensor u = squeezes     ? empty_output(x, squeezed_sizes(x))
                 : unsqueezes ? empty_output(x, unsqueezed_sizes(x))
                              : empty_output(x);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const ChannelMixArgs<T> args{squeezes ? squeezed_input<T>(x) : Squeezed<const T>{input<T>(x), 0, 0},
                                 matrix.const_data_ptr<T>(),
                                 offset.const_data_ptr<T>(),
                                 unsqueezes ? squeezed_output<T>(u) : Squeezed<T>{output<T>(u), 0, 0},
                                 x.size(0),
                                 channels,
                                 squeezes ? positions_of(u) : positions_of(x),
                                 subtract_first};
    if (x.is_cpu()) return cpu::channel_mix(args, torch_threads());
    const CudaScope scope(x);
#ifdef PYGLOW_WITH_CUDA
    CudaScope::check(cuda::channel_mix(args, scope.stream()));
#endif
  });
  return u;
}

// grad_x, grad_M, grad_c of u = M x + c; with center, of the product with x - center. x may be squeezed on the way in,
// and grad_x unsqueezed on the way out. `added` belongs to grad_u.
std::tuple<at::Tensor, at::Tensor, at::Tensor> channel_mix_backward(const at::Tensor& x_in, const at::Tensor& grad_u_in,
                                                                    const at::Tensor& matrix_in,
                                                                    const std::optional<at::Tensor>& center_in,
                                                                    const std::optional<at::Tensor>& added_in,
                                                                    bool squeezes) {
  check_state("x", x_in);
  check_squeeze(squeezes ? 1 : 0, x_in);
  check_shape("grad_u", grad_u_in, squeezes ? at::IntArrayRef(squeezed_sizes(x_in)) : x_in.sizes());
  check_like("grad_u", grad_u_in, "x", x_in);
  check_matrix("matrix", matrix_in, "x", x_in, grad_u_in.size(1));
  if (center_in) check_vector("center", *center_in, "x", x_in, grad_u_in.size(1));
  const at::Tensor added = check_added(added_in, "grad_u", grad_u_in);
  const at::Tensor x = squeezes ? x_in : with_position_stride(x_in), grad_u = with_position_stride(grad_u_in);
  const at::Tensor matrix = matrix_in.contiguous();
  const at::Tensor center = center_in ? center_in->contiguous() : at::Tensor();
  at::Tensor grad_x = empty_output(x), grad_matrix = at::empty_like(matrix);
  at::Tensor grad_offset = at::empty({grad_u.size(1)}, x.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const ChannelMixBackwardArgs<T> args{squeezes ? squeezed_input<T>(x) : Squeezed<const T>{input<T>(x), 0, 0},
                                         split_grad<T>(grad_u, added),
                                         matrix.const_data_ptr<T>(),
                                         center.defined() ? center.const_data_ptr<T>() : nullptr,
                                         squeezes ? squeezed_output<T>(grad_x) : Squeezed<T>{output<T>(grad_x), 0, 0},
                                         grad_matrix.mutable_data_ptr<T>(),
                                         grad_offset.mutable_data_ptr<T>(),
                                         x.size(0),
                                         grad_u.size(1),
                                         positions_of(grad_u)};
    if (x.is_cpu()) return cpu::channel_mix_backward(args, torch_threads());
    const CudaScope scope(x);
#ifdef PYGLOW_WITH_CUDA
    const int64_t bytes = cuda::channel_mix_backward_scratch<T>(args.samples, args.channels, args.positions);
    const at::Tensor scratch = CudaScope::scratch(x, bytes);
    CudaScope::check(cuda::channel_mix_backward(args, scratch.mutable_data_ptr(), scope.stream()));
#endif
  });
  return {grad_x, grad_matrix, grad_offset};
}

// y and log_det of the coupling, or of its inverse.
std::tuple<at::Tensor, at::Tensor> coupling(const at::Tensor& x_in, const at::Tensor& net_out_in, int64_t map,
                                            int64_t order, bool inverse, double bias, double eps, double clamp) {
  const Kind kind{map, order, inverse, bias, eps, clamp};
  check_state("x", x_in);
  const int64_t transformed = check_net_out(net_out_in, "x", x_in, kind);
  const at::Tensor x = with_position_stride(x_in), net_out = with_position_stride(net_out_in);
  at::Tensor out = empty_output(x), log_det = at::empty({x.size(0)}, x.options());
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const CouplingArgs<T> args{input<T>(x), net_input(net_out), output<T>(out), log_det.mutable_data_ptr<T>(),
                               x.size(0),   x.size(1),          transformed,    positions_of(x),
                               kind.as<T>()};
    if (x.is_cpu()) return cpu::coupling(args, torch_threads());
    const CudaScope scope(x);
#ifdef PYGLOW_WITH_CUDA
    const int64_t bytes = cuda::coupling_scratch(args.samples, args.transformed, args.positions);
    const at::Tensor scratch = CudaScope::scratch(x, bytes);
    CudaScope::check(cuda::coupling(args, scratch.mutable_data_ptr(), scope.stream()));
#endif
  });
  check_overflow(kind, log_det);
  return {out, log_det};
}

// From the output: grad_in (without the net's part), grad_net_out, and the input if it is wanted (else empty).
std::tuple<at::Tensor, at::Tensor, at::Tensor> coupling_backward(const at::Tensor& out_in, const at::Tensor& net_out_in,
                                                                 const at::Tensor& grad_out_in,
                                                                 const at::Tensor& grad_log_det_in, int64_t map,
                                                                 int64_t order, bool inverse, double bias, double eps,
                                                                 double clamp, bool want_input) {
  const Kind kind{map, order, inverse, bias, eps, clamp};
  check_state("out", out_in);
  const int64_t transformed = check_net_out(net_out_in, "out", out_in, kind);
  check_output_grads("grad_out", grad_out_in, grad_log_det_in, "out", out_in);
  const at::Tensor out = with_position_stride(out_in), net_out = with_position_stride(net_out_in);
  const at::Tensor grad_out = with_position_stride(grad_out_in), grad_log_det = grad_log_det_in.contiguous();
  at::Tensor grad_in = empty_output(out), grad_net_out = empty_output(net_out);
  at::Tensor in = want_input ? empty_output(out) : at::empty({0}, out.options());
  with_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const CouplingBackwardArgs<T> args{input<T>(out),
                                       net_input(net_out),
                                       input<T>(grad_out),
                                       grad_log_det.const_data_ptr<T>(),
                                       want_input ? output<T>(in) : Strided<T>{nullptr, 0, 0, 0},
                                       output<T>(grad_in),
                                       net_grad(grad_net_out),
                                       out.size(0),
                                       out.size(1),
                                       transformed,
                                       positions_of(out),
                                       kind.as<T>()};
    if (out.is_cpu()) return cpu::coupling_backward(args, torch_threads());
    const CudaScope scope(out);
#ifdef PYGLOW_WITH_CUDA
    CudaScope::check(cuda::coupling_backward(args, scope.stream()));
#endif
  });
  return {grad_in, grad_net_out, in};
}

}  // namespace
}  // namespace pyglow::bindings

namespace pyglow::bindings {

void register_step_ops(pybind11::module_& m) {
  m.def("channel_mix", &channel_mix, NoGil());
  m.def("channel_mix_backward", &channel_mix_backward, NoGil());
  m.def("coupling", &coupling, NoGil());
  m.def("coupling_backward", &coupling_backward, NoGil());
}

}  // namespace pyglow::bindings
