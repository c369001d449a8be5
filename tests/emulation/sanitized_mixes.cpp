#include "sanitized.h"

namespace sanitized {
namespace {

// With width > 0 the side away from the coupling nets is images.
template <class T>
void mix(const Shape& s, bool channels_last, int64_t width) {
  const int64_t image_c = width ? s.c / 4 : s.c, image_p = width ? 4 * s.p : s.p;
  const Tensor<T> x(s.n, image_c, image_p, channels_last, 1), grad_u(s.n, s.c, s.p, channels_last, 2);
  const Tensor<T> matrix(1, s.c, s.c, false, 3), offset(1, s.c, 1, false, 4);
  for (const bool subtract_first : {false, true}) {
    const Tensor<T> u(s.n, s.c, s.p, channels_last, 0);
    driver::run(pyglow::ChannelMixArgs<T>{.x = x.in(width),
                                          .matrix = matrix.data(),
                                          .offset = offset.data(),
                                          .u = u.out(0),
                                          .samples = s.n,
                                          .channels = s.c,
                                          .positions = s.p,
                                          .subtract_first = subtract_first});
    u.expect_written("channel_mix");
  }
  if (width > 0) {
    const Tensor<T> image(s.n, image_c, image_p, channels_last, 0);
    driver::run(pyglow::ChannelMixArgs<T>{.x = grad_u.in(0),
                                          .matrix = matrix.data(),
                                          .offset = offset.data(),
                                          .u = image.out(width),
                                          .samples = s.n,
                                          .channels = s.c,
                                          .positions = s.p,
                                          .subtract_first = false});
    image.expect_written("unsqueezed channel_mix");
  }
  const int64_t added_channels = s.c / 2;
  const Tensor<T> added(s.n, added_channels, s.p, !channels_last, 5);
  for (const pyglow::Strided<const T>& part : {pyglow::Strided<const T>{}, added.in()}) {
    const Tensor<T> grad_x(s.n, image_c, image_p, channels_last, 0), grad_matrix(1, s.c, s.c, false, 0);
    const Tensor<T> grad_offset(1, s.c, 1, false, 0);
    driver::run(
        pyglow::ChannelMixBackwardArgs<T>{.x = x.in(width),
                                          .grad_u = {grad_u.in(), part, part.data == nullptr ? 0 : added_channels},
                                          .matrix = matrix.data(),
                                          .center = offset.data(),
                                          .grad_x = grad_x.out(width),
                                          .grad_matrix = grad_matrix.data(),
                                          .grad_offset = grad_offset.data(),
                                          .samples = s.n,
                                          .channels = s.c,
                                          .positions = s.p});
    grad_x.expect_written("grad_x");
    grad_matrix.expect_written("grad_matrix");
    grad_offset.expect_written("grad_offset");
  }
}

template <class T>
void all() {
  // Vector path and tail, one block and several, several groups and chunks of channels, one sample and several.
  multiprocessors = 1;
  for (const bool channels_last : {false, true}) {
    for (const Shape& s : {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{1, 70, 8}})
      mix<T>(s, channels_last, 0);
    for (const Shape& s : {Shape{2, 4, 15}, Shape{1, 12, 180}, Shape{1, 72, 10}}) mix<T>(s, channels_last, 5);
    for (const Shape& s : {Shape{2, 4, 16}, Shape{1, 12, 200}, Shape{1, 72, 8}}) mix<T>(s, channels_last, 8);
  }
  // Two splits of the positions with several tiles each.
  multiprocessors = 132;
  mix<T>({1, 6, 1204}, false, 0);
  mix<T>({1, 6, 1205}, false, 0);
  // The cut of small products for a large GPU.
  for (const bool channels_last : {false, true}) {
    for (const Shape& s : {Shape{3, 37, 4}, Shape{1, 70, 8}}) mix<T>(s, channels_last, 0);
    mix<T>({1, 72, 8}, channels_last, 8);
  }
}

}  // namespace

void mixes() {
  all<float>();
  if constexpr (in_double) all<double>();
}

}  // namespace sanitized
