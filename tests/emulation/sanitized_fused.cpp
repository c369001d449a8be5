#include "sanitized.h"

namespace sanitized {
namespace {

using pyglow::NetType;
using pyglow::Order;
using pyglow::ScaleMap;

template <class T>
void fuse(const Shape& s, bool channels_last, bool net_last, NetType type, ScaleMap map, Order order) {
  const int64_t transformed = (s.c + 1) / 2, net_channels = map == ScaleMap::none ? transformed : 2 * transformed;
  const Tensor<T> in(s.n, s.c, s.p, channels_last, 1), matrix(1, s.c, s.c, false, 3), offset(1, s.c, 1, false, 4);
  const Net<T> net_out(s.n, net_channels, s.p, net_last, 2, type);
  pyglow::CouplingKind<T> kind = {map, order, false, {T(2), T(0.1), T(2)}};
  for (const bool inverse : {true, false}) {
    kind.inverse = inverse;
    const Tensor<T> out(s.n, s.c, s.p, channels_last, 0), log_det(s.n, 1, 1, false, 0);
    driver::run(
        pyglow::CouplingMixArgs<T>{.coupling = coupling_args<T>(s, in, net_out, out, log_det, transformed, kind),
                                   .matrix = matrix.data(),
                                   .offset = offset.data()});
    out.expect_written("coupling_mix");
    log_det.expect_written("log_det");
  }

  const Tensor<T> grad(s.n, s.c, s.p, channels_last, 5), grad_log_det(s.n, 1, 1, false, 6);
  const int64_t added_channels = s.c - transformed;
  const Tensor<T> added(s.n, added_channels, s.p, net_last, 7);
  for (const pyglow::Strided<const T>& part : {pyglow::Strided<const T>{}, added.in()}) {
    const Tensor<T> grad_in(s.n, s.c, s.p, channels_last, 0), grad_matrix(1, s.c, s.c, false, 0);
    const Tensor<T> grad_offset(1, s.c, 1, false, 0);
    const Net<T> grad_net_out(s.n, net_channels, s.p, net_last, 0, type);
    driver::run(
        pyglow::CouplingMixBackwardArgs<T>{.in = in.in(),
                                           .net_out = net_out.in(),
                                           .grad_out = {grad.in(), part, part.data == nullptr ? 0 : added_channels},
                                           .grad_log_det = grad_log_det.data(),
                                           .matrix = matrix.data(),
                                           .grad_in = grad_in.out(),
                                           .grad_net_out = grad_net_out.out(),
                                           .grad_matrix = grad_matrix.data(),
                                           .grad_offset = grad_offset.data(),
                                           .samples = s.n,
                                           .channels = s.c,
                                           .transformed = transformed,
                                           .positions = s.p,
                                           .kind = kind});
    grad_in.expect_written("grad_in");
    grad_net_out.expect_written("grad_net_out");
    grad_matrix.expect_written("grad_matrix");
    grad_offset.expect_written("grad_offset");
  }

  const Tensor<T> x(s.n, s.c, s.p, channels_last, 0), grad_u(s.n, s.c, s.p, channels_last, 0);
  const Net<T> grad_net_out(s.n, net_channels, s.p, net_last, 0, type);
  driver::run(pyglow::StepBackwardArgs<T>{.y = in.in(),
                                          .net_out = net_out.in(),
                                          .grad_y = grad.in(),
                                          .grad_log_det = grad_log_det.data(),
                                          .inverse_matrix = matrix.data(),
                                          .offset = offset.data(),
                                          .x = x.out(),
                                          .grad_u = grad_u.out(),
                                          .grad_net_out = grad_net_out.out(),
                                          .samples = s.n,
                                          .channels = s.c,
                                          .transformed = transformed,
                                          .positions = s.p,
                                          .kind = kind});
  x.expect_written("x");
  grad_u.expect_written("grad_u");
  grad_net_out.expect_written("grad_net_out");
}

template <class T>
void all() {
  // Vector path and tail; one sample to several tiles, several samples to a tile; several groups and chunks of
  // channels; blocks that walk several tiles, with samples within a block's range and across two of them.
  multiprocessors = 1;
  for (const Shape& s : {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{1, 70, 8}})
    for (const bool channels_last : {false, true})
      fuse<T>(s, channels_last, channels_last, NetType::state, ScaleMap::sigmoid, Order::shift_scale);
  // The cut of small products for a large GPU; and so below.
  multiprocessors = 132;
  for (const Shape& s : {Shape{3, 37, 4}, Shape{1, 70, 8}})
    for (const bool channels_last : {false, true})
      fuse<T>(s, channels_last, channels_last, NetType::state, ScaleMap::sigmoid, Order::shift_scale);
  for (int type = 1; type < net_types<T>; ++type)
    for (const bool channels_last : {false, true})
      fuse<T>({2, 6, 44}, channels_last, channels_last, static_cast<NetType>(type), ScaleMap::sigmoid,
              Order::shift_scale);
  for (const Shape& s : {Shape{5, 6, 240}, Shape{5, 6, 241}, Shape{90, 2, 1}})
    fuse<T>(s, false, false, NetType::state, ScaleMap::sigmoid, Order::shift_scale);
  // Patches: halves of two, six, eight and 38 channels; additive ones too.
  for (const Shape& s : {Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 16, 20}, Shape{1, 76, 8}})
    for (int type = 0; type < net_types<T>; ++type)
      for (const ScaleMap map : {ScaleMap::none, ScaleMap::sigmoid})
        fuse<T>(s, false, true, static_cast<NetType>(type), map, Order::shift_scale);
  for (const ScaleMap map : maps)
    for (const Order order : orders)
      for (const int64_t positions : {4, 5}) fuse<T>({2, 4, positions}, false, false, NetType::state, map, order);
}

}  // namespace

void fused() {
  all<float>();
  if constexpr (in_double) all<double>();
}

}  // namespace sanitized
