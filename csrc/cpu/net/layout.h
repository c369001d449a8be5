// Where the layers of a net read and write, and what forward and backward have in common.
//
// Pixels are handled in cuts, which go from layer to layer while their hidden activations are in the second-level
// cache, as long as no layer looks beyond its own pixel. A layer that does reads planes of a whole turn of samples (see
// parts.h), gathered while they are packed for its product; the layers before it have then run on the whole turn. A
// last layer with few channels does its product first, of a cut alone and for each tap, and then sums the taps. In the
// backward the first layer does so.
#pragma once
#include <optional>

#include "cpu/net/parts.h"

namespace pyglow::cpu::PYGLOW_ISA {

template <class T>
void fill_zero(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = T{};
}

// What forward and backward share. Boundary b lies before layer b; the input is 0, the output `count`.
template <class T, class S>
class Layout {
 public:
  Layout(const NetChain<T>& net, int64_t samples, const Extent& extent)
      : net(net), extent(extent), samples(samples), cuts(samples, extent, rows_of(net), sizeof(S)) {}

  const NetChain<T>& net;
  const Extent& extent;
  const int64_t samples;
  const Cuts cuts;

  const NetLayer<T>& layer(int64_t i) const { return net.layers[i]; }
  int64_t taps(int64_t i) const { return layer(i).window.taps(); }
  int64_t channels(int64_t boundary) const { return boundary == 0 ? layer(0).in : layer(boundary - 1).out; }
  int64_t margin() const { return net.margin(extent); }

  // Whether the last layer's taps are summed after its product; in the backward, the first one's.
  bool sums_last() const { return taps(net.count - 1) > 1 && 2 * net.last().out <= net.last().in; }
  bool sums_first() const { return taps(0) > 1 && 2 * layer(0).in <= layer(0).out; }
  // Whether the values at a boundary, and the gradients there, lie in planes of a turn; else in blocks of a cut.
  bool has_planes(int64_t boundary) const {
    if (boundary == net.count) return false;
    return taps(boundary) > 1 && !(boundary == net.count - 1 && sums_last());
  }
  bool has_gradient_planes(int64_t boundary) const {
    return boundary > 0 && taps(boundary - 1) > 1 && !(boundary == 1 && sums_first());
  }

  // Where a hidden boundary is kept, the result of its activation or the argument.
  template <class Kept>
  Kept* kept(Kept* memory, int64_t boundary, bool argument) const {
    int64_t rows = 0;
    for (int64_t b = 1; b < boundary; ++b) rows += channels(b) * (keeps_input(layer(b - 1).activation) ? 2 : 1);
    if (argument) rows += channels(boundary);
    return memory + margin() + rows * samples * extent.positions();
  }
  // The part that a cut has of what is kept; or of memory for a turn or a cut, whose planes have a stride of their own.
  template <class Kept>
  Matrix<Kept> part(Kept* memory, int64_t boundary, bool is_kept, const Turn& turn, const Cut& cut) const {
    const int64_t rows = channels(boundary);
    if (has_planes(boundary)) {
      const int64_t stride = is_kept ? turn.pixels : plane_stride<S>(cuts.most_in_turn());
      return by_rows(memory + (is_kept ? rows * turn.first : 0) + cut.begin, stride);
    }
    return in_blocks(memory + (is_kept ? rows * (turn.first + cut.begin) : 0), rows, cut.count());
  }
  int64_t part_elements(int64_t boundary) const {
    return channels(boundary) * (has_planes(boundary) ? plane_stride<S>(cuts.most_in_turn()) : cuts.most_in_cut());
  }

 private:
  static int64_t rows_of(const NetChain<T>& net) {
    int64_t most = 1;
    for (int64_t i = 0; i < net.count; ++i) most = larger(most, (net.layers[i].in + net.layers[i].out) / 2);
    return most;
  }
};

// The shifts of all layers that look around; layers with the same window share them.
template <class T, class S>
class AllShifts {
 public:
  AllShifts(const Layout<T, S>& layout, Workspace& work) : layout_(layout) {
    for (int64_t i = 0; i < layout.net.count; ++i)
      if (layout.taps(i) > 1 && first_with_window_of(i) == i)
        rooms_[i] =
            work.room<uint32_t>(Shifts::words(layout.layer(i).window, layout.extent, layout.cuts.most_in_turn()));
  }
  void fill(const Workspace& work, const Threads& threads) {
    for (int64_t i = 0; i < layout_.net.count; ++i)
      if (rooms_[i].place >= 0)
        found_[i].emplace(layout_.layer(i).window, layout_.extent, layout_.cuts.most_in_turn(), work[rooms_[i]],
                          threads);
  }
  // Null for a layer that looks at its own pixel alone.
  const Shifts* operator[](int64_t i) const {
    return layout_.taps(i) > 1 ? &*found_[first_with_window_of(i)] : nullptr;
  }

 private:
  int64_t first_with_window_of(int64_t i) const {
    const Window& own = layout_.layer(i).window;
    int64_t j = 0;
    for (; j < i; ++j) {
      const Window& other = layout_.layer(j).window;
      bool equal = true;
      for (int axis = 0; axis < 3; ++axis)
        equal = equal && own.size[axis] == other.size[axis] && own.dilation[axis] == other.dilation[axis];
      if (equal) break;
    }
    return j;
  }

  const Layout<T, S>& layout_;
  Workspace::Room<uint32_t> rooms_[max_net_layers];
  std::optional<Shifts> found_[max_net_layers];
};

// The weight (out, in, taps) as (out, taps, in).
template <class T>
const T* by_taps(const NetLayer<T>& layer, T* to, const Threads& threads) {
  const int64_t taps = layer.window.taps(), size = layer.in * taps;
  parallel(threads, layer.out, grain_of(size), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      for (int64_t i = 0; i < layer.in; ++i)
        for (int64_t t = 0; t < taps; ++t) to[o * size + t * layer.in + i] = layer.weight[o * size + i * taps + t];
  });
  return to;
}

// exp(3 log_gain), or ones.
template <class T>
void gain_of(const NetChain<T>& net, T* gain) {
  for (int64_t k = 0; k < net.last().out; ++k)
    gain[k] = net.log_gain == nullptr ? T(1) : math::exp(T(3) * net.log_gain[k]);
}

// Calls f with a number of the type that the net multiplies.
template <class T, class F>
void with_numbers(bool half, const F& f) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (half) return f(BFloat16{});
  }
#if !defined(PYGLOW_HALF_ONLY)
  f(T{});
#endif
}

// Copies x, and behind it cond, to boundary 0: those pixels that are held at a time, of a turn or of a cut.
template <class Args, class T, class S>
void read_input(const Args& args, const Layout<T, S>& layout, const Turn& turn, const Cut& cut, S* memory,
                const Threads& threads) {
  const Matrix<S> to = layout.part(memory, 0, false, turn, cut);
  const int64_t own = layout.channels(0) - args.cond_channels;
  read_image(args.x, layout.extent, turn.sample, own, cut.begin, cut.end, to, 0, threads);
  if (args.cond_channels > 0)
    read_image(args.cond, layout.extent, turn.sample, args.cond_channels, cut.begin, cut.end, to, own, threads);
}

// Fills the last block up with zeros, where numbers are multiplied in pairs.
template <class S>
void end_with_zeros(const Matrix<S>& blocks, int64_t rows, int64_t pixels) {
  const int64_t rest = pixels % pixel_block;
  if (!in_pairs<S> || rest == 0) return;
  for (int64_t row = 0; row < rows; ++row) fill_zero(at(blocks, row, pixels - rest) + rest, pixel_block - rest);
}

// What follows a hidden layer.
template <class T, class S>
void set_activation(const NetLayer<T>& layer, After<S>& after) {
  after.activation = layer.activation;
  after.parameter = layer.parameter;
}

template <class S, class Out>
void multiply(const ProductArgs<S, Out>& product, const Threads& threads) {
  matrix_products(&product, 1, threads);
}

// The rest of a matrix from a pixel on with which a block begins.
template <class T>
Matrix<T> from_pixel(const Matrix<T>& m, int64_t pixel) {
  return {m.data + pixel / pixel_block * m.block, m.row, m.block, m.tail - pixel, m.tail_row};
}

// A product whose result is a cut of an image: sample by sample into the image itself where it lies in planes of whole
// blocks, else by way of `room`, (rows, stride).
template <class T, class S>
void multiply_to_image(ProductArgs<S, T> product, const Image<T>& image, const Extent& extent, const Turn& turn,
                       const Cut& cut, T* room, int64_t stride, const Threads& threads) {
  const int64_t plane = extent.positions();
  const bool fits = turn.samples == 1 || (plane % pixel_block == 0 && plane >= least_pixels);
  if (!has_planes(image, extent) || !fits) {
    product.c = by_rows(room, stride);
    multiply(product, threads);
    write_planes(read_only(product.c), image, extent, turn.sample, product.rows, cut.begin, cut.end, threads);
    return;
  }
  const Right<S> right = product.b;
  for (int64_t p = cut.begin; p < cut.end;) {
    const int64_t n = p / plane, end = smaller(cut.end, (n + 1) * plane);
    product.c = by_rows(image.data + (turn.sample + n) * image.sample + (p - n * plane), image.channel);
    product.b = {from_pixel(right.matrix, p - cut.begin), right.shifts, right.transposed, p};
    product.columns = end - p;
    multiply(product, threads);
    p = end;
  }
}

}  // namespace pyglow::cpu::PYGLOW_ISA
