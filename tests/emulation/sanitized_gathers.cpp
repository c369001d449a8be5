#include <vector>

#include "sanitized.h"

namespace sanitized {
namespace {

using pyglow::NetType;
using pyglow::Order;
using pyglow::ScaleMap;

// A permutation whose last element is the last of its allocation.
std::vector<int64_t> permutation(int64_t channels) {
  std::vector<int64_t> index(channels);
  for (int64_t i = 0; i < channels; ++i) index[i] = channels - 1 - i;
  if (channels > 2) std::swap(index[0], index[1]);
  return index;
}

// Without a coupling; with width > 0 x is images.
template <class T>
void gather(const Shape& s, bool channels_last, int64_t width) {
  const int64_t image_c = width ? s.c / 4 : s.c, image_p = width ? 4 * s.p : s.p;
  const Tensor<T> x(s.n, image_c, image_p, channels_last, 1), grad_out(s.n, s.c, s.p, channels_last, 2);
  const Tensor<T> scale(1, s.c, 1, false, 3), offset(1, s.c, 1, false, 4);
  const std::vector<int64_t> index = permutation(s.c);
  const Tensor<T> u(s.n, s.c, s.p, channels_last, 0);
  driver::run(pyglow::GatherArgs<T>{.in = x.in(width),
                                    .net_out = {},
                                    .map = {scale.data(), offset.data(), nullptr, index.data()},
                                    .out = u.out(0),
                                    .log_det = nullptr,
                                    .samples = s.n,
                                    .channels = s.c,
                                    .transformed = 0,
                                    .positions = s.p,
                                    .kind = {}});
  u.expect_written("gather");
  const int64_t added_channels = s.c / 2;
  const Tensor<T> added(s.n, added_channels, s.p, !channels_last, 5);
  const Tensor<T> grad_in(s.n, image_c, image_p, channels_last, 0);
  const Tensor<T> grad_scale(1, s.c, 1, false, 0), grad_offset(1, s.c, 1, false, 0);
  driver::run(pyglow::GatherBackwardArgs<T>{.in = x.in(width),
                                            .net_out = {},
                                            .grad_out = {grad_out.in(), added.in(), added_channels},
                                            .grad_log_det = nullptr,
                                            .map = {scale.data(), nullptr, offset.data(), index.data()},
                                            .grad_in = grad_in.out(width),
                                            .grad_net_out = {},
                                            .grad_scale = grad_scale.data(),
                                            .grad_offset = grad_offset.data(),
                                            .samples = s.n,
                                            .channels = s.c,
                                            .transformed = 0,
                                            .positions = s.p,
                                            .kind = {}});
  grad_in.expect_written("grad_in");
  grad_scale.expect_written("grad_scale");
  grad_offset.expect_written("grad_offset");
}

template <class T>
void couple(const Shape& s, bool channels_last, bool net_last, NetType type, ScaleMap map, Order order) {
  const int64_t transformed = (s.c + 1) / 2, net_channels = map == ScaleMap::none ? transformed : 2 * transformed;
  const Tensor<T> in(s.n, s.c, s.p, channels_last, 1), scale(1, s.c, 1, false, 3), offset(1, s.c, 1, false, 4);
  const Net<T> net_out(s.n, net_channels, s.p, net_last, 2, type);
  const std::vector<int64_t> index = permutation(s.c);
  pyglow::CouplingKind<T> kind = {map, order, true, {T(2), T(0.1), T(2)}};
  const Tensor<T> out(s.n, s.c, s.p, channels_last, 0), log_det(s.n, 1, 1, false, 0);
  driver::run(pyglow::GatherArgs<T>{.in = in.in(0),
                                    .net_out = net_out.in(),
                                    .map = {scale.data(), nullptr, offset.data(), index.data()},
                                    .out = out.out(0),
                                    .log_det = log_det.data(),
                                    .samples = s.n,
                                    .channels = s.c,
                                    .transformed = transformed,
                                    .positions = s.p,
                                    .kind = kind});
  out.expect_written("gather of a coupling");
  log_det.expect_written("log_det");

  kind.inverse = false;
  const Tensor<T> grad(s.n, s.c, s.p, channels_last, 5), grad_log_det(s.n, 1, 1, false, 6);
  const Tensor<T> grad_in(s.n, s.c, s.p, channels_last, 0);
  const Tensor<T> grad_scale(1, s.c, 1, false, 0), grad_offset(1, s.c, 1, false, 0);
  const Net<T> grad_net_out(s.n, net_channels, s.p, net_last, 0, type);
  driver::run(pyglow::GatherBackwardArgs<T>{.in = in.in(0),
                                            .net_out = net_out.in(),
                                            .grad_out = {grad.in(), {}, 0},
                                            .grad_log_det = grad_log_det.data(),
                                            .map = {scale.data(), nullptr, nullptr, index.data()},
                                            .grad_in = grad_in.out(0),
                                            .grad_net_out = grad_net_out.out(),
                                            .grad_scale = grad_scale.data(),
                                            .grad_offset = grad_offset.data(),
                                            .samples = s.n,
                                            .channels = s.c,
                                            .transformed = transformed,
                                            .positions = s.p,
                                            .kind = kind});
  grad_in.expect_written("grad_in");
  grad_net_out.expect_written("grad_net_out");
  grad_scale.expect_written("grad_scale");
  grad_offset.expect_written("grad_offset");

  const Tensor<T> x(s.n, s.c, s.p, channels_last, 0), grad_u(s.n, s.c, s.p, channels_last, 0);
  const Net<T> step_grad_net_out(s.n, net_channels, s.p, net_last, 0, type);
  driver::run(pyglow::StepGatherBackwardArgs<T>{.y = in.in(),
                                                .net_out = net_out.in(),
                                                .grad_y = grad.in(),
                                                .grad_log_det = grad_log_det.data(),
                                                .map = {scale.data(), nullptr, offset.data(), index.data()},
                                                .x = x.out(),
                                                .grad_u = grad_u.out(),
                                                .grad_net_out = step_grad_net_out.out(),
                                                .samples = s.n,
                                                .channels = s.c,
                                                .transformed = transformed,
                                                .positions = s.p,
                                                .kind = kind});
  x.expect_written("x");
  grad_u.expect_written("grad_u");
  step_grad_net_out.expect_written("grad_net_out of a step");
}

template <class T>
void all() {
  // Vector path and tail, one block and several that loop, one share of the positions and several.
  for (const bool channels_last : {false, true}) {
    for (const Shape& s : {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{3, 37, 4}, Shape{2, 6, 1204}, Shape{90, 2, 1}}) {
      gather<T>(s, channels_last, 0);
      couple<T>(s, channels_last, channels_last, NetType::state, ScaleMap::sigmoid, Order::shift_scale);
    }
    gather<T>({2, 4, 15}, channels_last, 5);
    for (int type = 1; type < net_types<T>; ++type)
      couple<T>({2, 6, 44}, channels_last, channels_last, static_cast<NetType>(type), ScaleMap::sigmoid,
                Order::shift_scale);
  }
  // Patches: halves of two, six, eight and 38 channels; additive ones too.
  for (const Shape& s : {Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 16, 20}, Shape{1, 76, 8}})
    for (int type = 0; type < net_types<T>; ++type)
      for (const ScaleMap map : {ScaleMap::none, ScaleMap::sigmoid})
        couple<T>(s, false, true, static_cast<NetType>(type), map, Order::shift_scale);
  for (const ScaleMap map : maps)
    for (const Order order : orders)
      for (const int64_t positions : {4, 5}) couple<T>({2, 4, positions}, false, false, NetType::state, map, order);
}

}  // namespace

void gathers() {
  all<float>();
  if constexpr (in_double) all<double>();
}

}  // namespace sanitized
