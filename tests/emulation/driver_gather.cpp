// The C interface to the channel mixing by a permutation, which emulator.py calls.
#include "interface.h"

using driver::guarded;
using driver::Image;
using driver::kind_of;
using driver::Net;
using driver::net_view;
using driver::Sizes;
using driver::Tensor;
using driver::Variant;
using driver::view;

namespace {

struct Map {
  const void *scale, *offset, *center;  // offset and center may be null
  const int64_t* index;
};

template <class T>
pyglow::Gather<T> map_of(const Map& map) {
  return {static_cast<const T*>(map.scale), static_cast<const T*>(map.offset), static_cast<const T*>(map.center),
          map.index};
}

}  // namespace

extern "C" {

const char* emulated_gather(int is_double, unsigned seed, Sizes sizes, Variant variant, Image in, Net net_out, Map map,
                            Image out, void* log_det) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::GatherArgs<T>{.in = view<const T>(in),
                                      .net_out = net_view<const void>(net_out),
                                      .map = map_of<T>(map),
                                      .out = view<T>(out),
                                      .log_det = static_cast<T*>(log_det),
                                      .samples = sizes.samples,
                                      .channels = sizes.channels,
                                      .transformed = sizes.transformed,
                                      .positions = sizes.positions,
                                      .kind = kind_of<T>(variant)});
  });
}

const char* emulated_gather_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Image in, Net net_out,
                                     Tensor grad_out, Tensor added, int64_t added_channels, const void* grad_log_det,
                                     Map map, Image grad_in, Net grad_net_out, void* grad_scale, void* grad_offset) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(
        pyglow::GatherBackwardArgs<T>{.in = view<const T>(in),
                                      .net_out = net_view<const void>(net_out),
                                      .grad_out = {view<const T>(grad_out), view<const T>(added), added_channels},
                                      .grad_log_det = static_cast<const T*>(grad_log_det),
                                      .map = map_of<T>(map),
                                      .grad_in = view<T>(grad_in),
                                      .grad_net_out = net_view<void>(grad_net_out),
                                      .grad_scale = static_cast<T*>(grad_scale),
                                      .grad_offset = static_cast<T*>(grad_offset),
                                      .samples = sizes.samples,
                                      .channels = sizes.channels,
                                      .transformed = sizes.transformed,
                                      .positions = sizes.positions,
                                      .kind = kind_of<T>(variant)});
  });
}

const char* emulated_step_gather_backward(int is_double, unsigned seed, Sizes sizes, Variant variant, Tensor y,
                                          Net net_out, Tensor grad_y, const void* grad_log_det, Map map, Tensor x,
                                          Tensor grad_u, Net grad_net_out) {
  return guarded(is_double, seed, [&](auto zero) {
    using T = decltype(zero);
    driver::run(pyglow::StepGatherBackwardArgs<T>{.y = view<const T>(y),
                                                  .net_out = net_view<const void>(net_out),
                                                  .grad_y = view<const T>(grad_y),
                                                  .grad_log_det = static_cast<const T*>(grad_log_det),
                                                  .map = map_of<T>(map),
                                                  .x = view<T>(x),
                                                  .grad_u = view<T>(grad_u),
                                                  .grad_net_out = net_view<void>(grad_net_out),
                                                  .samples = sizes.samples,
                                                  .channels = sizes.channels,
                                                  .transformed = sizes.transformed,
                                                  .positions = sizes.positions,
                                                  .kind = kind_of<T>(variant)});
  });
}

}  // extern "C"
