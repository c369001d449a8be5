#include "sanitized.h"

namespace sanitized {
namespace {

using pyglow::NetType;
using pyglow::Order;
using pyglow::ScaleMap;

template <class T>
void couple(const Shape& s, bool channels_last, bool net_last, NetType type, ScaleMap map, Order order, bool inverse) {
  const int64_t transformed = (s.c + 1) / 2, net_channels = map == ScaleMap::none ? transformed : 2 * transformed;
  const pyglow::CouplingKind<T> kind = {map, order, inverse, {T(2), T(0.1), T(2)}};
  const Tensor<T> in(s.n, s.c, s.p, channels_last, 1), out(s.n, s.c, s.p, channels_last, 0);
  const Net<T> net_out(s.n, net_channels, s.p, net_last, 2, type);
  const Tensor<T> log_det(s.n, 1, 1, false, 0);
  driver::run(coupling_args<T>(s, in, net_out, out, log_det, transformed, kind));
  out.expect_written("coupling");
  log_det.expect_written("log_det");

  const Tensor<T> grad_out(s.n, s.c, s.p, channels_last, 3), grad_log_det(s.n, 1, 1, false, 4);
  const Tensor<T> recovered(s.n, s.c, s.p, channels_last, 0), grad_in(s.n, s.c, s.p, channels_last, 0);
  const Net<T> grad_net_out(s.n, net_channels, s.p, net_last, 0, type);
  driver::run(pyglow::CouplingBackwardArgs<T>{.out = out.in(),
                                              .net_out = net_out.in(),
                                              .grad_out = grad_out.in(),
                                              .grad_log_det = grad_log_det.data(),
                                              .in = recovered.out(),
                                              .grad_in = grad_in.out(),
                                              .grad_net_out = grad_net_out.out(),
                                              .samples = s.n,
                                              .channels = s.c,
                                              .transformed = transformed,
                                              .positions = s.p,
                                              .kind = kind});
  recovered.expect_written("in");
  grad_in.expect_written("grad_in");
  grad_net_out.expect_written("grad_net_out");
}

template <class T>
void all() {
  // Vector path and tail, one block and several, several groups and chunks of channels, one sample and several.
  for (const Shape& s : {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{1, 70, 8}})
    for (const bool channels_last : {false, true})
      for (int type = 0; type < net_types<T>; ++type)
        couple<T>(s, channels_last, channels_last, static_cast<NetType>(type), ScaleMap::sigmoid, Order::shift_scale,
                  false);
  couple<T>({1, 6, 1205}, false, false, NetType::state, ScaleMap::sigmoid, Order::shift_scale, false);
  // Patches: halves of two, six, eight and 38 channels; additive ones too.
  for (const Shape& s : {Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 16, 20}, Shape{1, 76, 8}})
    for (int type = 0; type < net_types<T>; ++type)
      for (const ScaleMap map : {ScaleMap::none, ScaleMap::sigmoid})
        couple<T>(s, false, true, static_cast<NetType>(type), map, Order::shift_scale, false);
  for (const ScaleMap map : maps)
    for (const Order order : orders)
      for (const bool inverse : {false, true})
        for (const int64_t positions : {4, 5})
          couple<T>({2, 4, positions}, false, false, NetType::state, map, order, inverse);
}

}  // namespace

void couplings() {
  all<float>();
  if constexpr (in_double) all<double>();
}

}  // namespace sanitized
