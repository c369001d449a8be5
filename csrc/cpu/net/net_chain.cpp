// A coupling net, a chain of convolutions (or products, where a sample is one pixel), as matrix products over pixels,
// and its gradients. Compiled once per instruction set.
//
// Bias and activation ride in the products. Pixels are handled in cuts whose hidden activations stay in the
// second-level cache, from layer to layer, as far as no layer looks beyond its own pixel. One that does reads planes of
// a whole turn of samples, gathered as its product is packed; all layers before it have then run on the whole turn. A
// last layer with few channels is the other way round: the product by taps comes first, of the cut alone, and its taps
// are summed. In the backward, the same of the first layer. A hidden layer that is kept lies one turn or cut behind the
// other.
#include <optional>

#include "cpu/isa.h"
#include "cpu/net/parts.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

template <class T>
void fill_zero(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = T{};
}

PYGLOW_HD float exp_of(float x) { return __builtin_expf(x); }
PYGLOW_HD double exp_of(double x) { return __builtin_exp(x); }

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
  // Whether a boundary is there as planes of a turn: else in blocks of a cut. Of the gradients there, likewise.
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
  // Of that, or of memory for a turn or cut of it (then with the planes' stride), the part of a cut.
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
  void fill(const Workspace& work) {
    for (int64_t i = 0; i < layout_.net.count; ++i)
      if (rooms_[i].place >= 0)
        found_[i].emplace(layout_.layer(i).window, layout_.extent, layout_.cuts.most_in_turn(), work[rooms_[i]]);
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

// The weight (out, in, taps) as (out, taps, in), times the gain of each output channel.
template <class T>
T* by_taps(const NetLayer<T>& layer, const T* gain, T* to) {
  const int64_t taps = layer.window.taps();
  const T* from = layer.weight;
  for (int64_t o = 0; o < layer.out; ++o)
    for (int64_t i = 0; i < layer.in; ++i, from += taps)
      for (int64_t t = 0; t < taps; ++t)
        to[(o * taps + t) * layer.in + i] = gain == nullptr ? from[t] : gain[o] * from[t];
  return to;
}

template <class T>
void gain_of(const NetChain<T>& net, T* gain) {
  for (int64_t k = 0; k < net.last().out; ++k)
    gain[k] = net.log_gain == nullptr ? T(1) : exp_of(T(3) * net.log_gain[k]);
}

// x, and behind it cond, to boundary 0: what there is of it at a time, all of a turn or a cut.
template <class Args, class T, class S>
void read_input(const Args& args, const Layout<T, S>& layout, const Turn& turn, const Cut& cut, S* memory,
                const Threads& threads) {
  const Matrix<S> to = layout.part(memory, 0, false, turn, cut);
  const int64_t own = layout.channels(0) - args.cond_channels;
  const T* const no_gain = nullptr;
  read_image(args.x, layout.extent, turn.sample, own, cut.begin, cut.end, no_gain, to, 0, threads);
  if (args.cond_channels > 0)
    read_image(args.cond, layout.extent, turn.sample, args.cond_channels, cut.begin, cut.end, no_gain, to, own,
               threads);
}

// The end of the last of some whole blocks, where numbers are multiplied in pairs.
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
  after.parameter =
      layer.activation == Activation::leaky_relu || layer.activation == Activation::elu ? layer.parameter : 0;
}

template <class S, class Out>
void multiply(const ProductArgs<S, Out>& product, const Threads& threads) {
  matrix_products(&product, 1, threads);
}

// The matrix from a pixel on with which a block begins.
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

template <class T, class S>
void run(const NetArgs<T>& args, const Threads& threads) {
  const NetChain<T>& net = args.net;
  const Layout<T, S> layout(net, args.samples, args.extent);
  const Cuts& cuts = layout.cuts;
  if (cuts.turns() == 0) return;
  const int64_t last = net.count - 1, out = net.last().out, out_rows = out * layout.taps(last);
  const int64_t margin = layout.margin();
  const bool sums_last = layout.sums_last(), keeps = args.kept != nullptr;
  S* const kept = static_cast<S*>(args.kept);

  Workspace work;
  AllShifts<T, S> shifts(layout, work);
  const auto input = work.room<S>(layout.part_elements(0), margin);
  Workspace::Room<S> hidden[max_net_layers + 1];
  Workspace::Room<Packed<S>> packed[max_net_layers];
  for (int64_t i = 0; i <= last; ++i) {
    if (i > 0 && !keeps) hidden[i] = work.room<S>(layout.part_elements(i), margin);
    const NetLayer<T>& layer = net.layers[i];
    packed[i] = work.room<Packed<S>>(i == last && sums_last ? packed_size<S>(out_rows, layer.in)
                                                            : packed_size<S>(layer.out, layer.in * layout.taps(i)));
  }
  const auto gain_room = work.room<T>(out), bias_room = work.room<T>(out);
  const auto weight_room = work.room<T>(out_rows * net.last().in);
  const int64_t sum_size = sums_last
                               ? TapSum<T>::elements(out, layout.taps(last), net.last().window.reach(args.extent), cuts)
                               : out * plane_stride<T>(cuts.most_in_cut());
  const auto sum_room = work.room<T>(sum_size, margin);
  work.take();
  shifts.fill(work);

  T* const gain = work[gain_room];
  T* const bias = work[bias_room];
  gain_of(net, gain);
  for (int64_t k = 0; k < out; ++k) bias[k] = gain[k] * net.last().bias[k];
  Left<S> left[max_net_layers];
  for (int64_t i = 0; i <= last; ++i) {
    const NetLayer<T>& layer = net.layers[i];
    const int64_t inner = layer.in * layout.taps(i);
    if (i == last && sums_last) {
      left[i] =
          pack_left<S>(by_taps(layer, gain, work[weight_room]), false, out_rows, layer.in, work[packed[i]], threads);
    } else if (i == last && net.log_gain != nullptr) {
      T* const scaled = work[weight_room];
      for (int64_t k = 0; k < out; ++k)
        for (int64_t j = 0; j < inner; ++j) scaled[k * inner + j] = gain[k] * layer.weight[k * inner + j];
      left[i] = pack_left<S>(scaled, false, out, inner, work[packed[i]], threads);
    } else {
      left[i] = pack_left<S>(layer.weight, false, layer.out, inner, work[packed[i]], threads);
    }
  }
  std::optional<TapSum<T>> sum;
  if (sums_last) sum.emplace(*shifts[last], false, out, bias, cuts, work[sum_room]);

  for (int64_t t = 0; t < cuts.turns(); ++t) {
    const Turn turn = cuts.turn(t);
    if (layout.has_planes(0)) read_input(args, layout, turn, {0, turn.pixels}, work[input], threads);
    const auto boundary = [&](int64_t b, const Cut& cut) {
      if (b == 0) return layout.part(work[input], 0, false, turn, cut);
      return keeps ? layout.part(layout.kept(kept, b, false), b, true, turn, cut)
                   : layout.part(work[hidden[b]], b, false, turn, cut);
    };
    const auto run_last = [&](const Cut& cut, const Right<S>& right) {
      ProductArgs<S, T> product{.a = left[last],
                                .b = right,
                                .c = {},
                                .rows = out,
                                .columns = cut.count(),
                                .inner = sums_last ? net.last().in : net.last().in * layout.taps(last)};
      if (sums_last) {
        product.rows = out_rows;
        product.c = sum->product(cut);
        multiply(product, threads);
        sum->add(cut, cut.end == turn.pixels, threads, [&](int64_t p, int64_t n) {
          const Pieces pieces(args.y, args.extent, turn.sample, p, n);
          return [&args, pieces](int64_t channel, const T* values) {
            pieces.write(values, args.y.data + channel * args.y.channel);
          };
        });
        return;
      }
      product.after.bias = bias;
      multiply_to_image(product, args.y, args.extent, turn, cut, work[sum_room], plane_stride<T>(cuts.most_in_cut()),
                        threads);
    };
    if (sums_last) sum->begin();
    for (int64_t first = 0; first <= last;) {
      int64_t end = first + 1;  // of the layers that run from cut to cut
      while (end <= last && !layout.has_planes(end)) ++end;
      cuts.for_cuts(turn, [&](const Cut& cut) {
        if (first == 0 && !layout.has_planes(0)) read_input(args, layout, turn, cut, work[input], threads);
        for (int64_t i = first; i < end; ++i) {
          Right<S> right{read_only(boundary(i, cut)), i == last && sums_last ? nullptr : shifts[i], false, cut.begin};
          if (i == last) {
            run_last(cut, right);
            continue;
          }
          const NetLayer<T>& layer = net.layers[i];
          ProductArgs<S, S> product{.a = left[i],
                                    .b = right,
                                    .c = boundary(i + 1, cut),
                                    .rows = layer.out,
                                    .columns = cut.count(),
                                    .inner = layer.in * layout.taps(i)};
          product.after.bias = layer.bias;
          set_activation(layer, product.after);
          if (keeps && keeps_input(layer.activation))
            product.after.argument = layout.part(layout.kept(kept, i + 1, true), i + 1, true, turn, cut);
          multiply(product, threads);
        }
      });
      first = end;
    }
  }
}

template <class T, class S>
void run_backward(const NetBackwardArgs<T>& args, const Threads& threads) {
  const NetChain<T>& net = args.net;
  const Layout<T, S> layout(net, args.samples, args.extent);
  const Cuts& cuts = layout.cuts;
  const bool want_weights = args.grad_weight[0] != nullptr;
  const int64_t last = net.count - 1, out = net.last().out, in = net.layers[0].in;
  const bool sums_last = layout.sums_last(), sums_first = layout.sums_first();
  const int64_t margin = layout.margin(), most = cuts.most_in_cut(), whole_blocks = round_up(most, pixel_block);
  const int64_t turn_stride = plane_stride<S>(cuts.most_in_turn());
  const S* const kept = static_cast<const S*>(args.kept);
  const auto inner_of = [&](int64_t i) { return net.layers[i].in * layout.taps(i); };
  const auto back_inner_of = [&](int64_t i) { return net.layers[i].out * layout.taps(i); };

  if (want_weights)
    for (int64_t i = 0; i <= last; ++i) {
      if (cuts.turns() == 0) fill_zero(args.grad_weight[i], net.layers[i].out * inner_of(i));
      fill_zero(args.grad_bias[i], net.layers[i].out);
    }
  if (cuts.turns() == 0) {
    if (want_weights && args.grad_log_gain != nullptr) fill_zero(args.grad_log_gain, out);
    return;
  }

  Workspace work;
  AllShifts<T, S> shifts(layout, work);
  const auto input = work.room<S>(want_weights ? layout.part_elements(0) : 0, margin);
  // Of each boundary the gradient, and in whole blocks what is a left matrix: rows may be read for a block more.
  const auto blocks_room = [&](int64_t rows) { return work.room<S>((rows + 2 * block_rows + 8) * whole_blocks); };
  const auto output_grad =
      layout.has_gradient_planes(net.count) ? work.room<S>(out * turn_stride, margin) : blocks_room(out);
  Workspace::Room<S> grads[max_net_layers + 1], in_blocks_room[max_net_layers + 1];
  Workspace::Room<Packed<S>> packed[max_net_layers], packed_grads[max_net_layers];
  Workspace::Room<T> turned[max_net_layers];
  for (int64_t i = 0; i <= last; ++i) {
    const NetLayer<T>& layer = net.layers[i];
    const bool has_planes = layout.has_gradient_planes(i + 1);
    if (i < last) grads[i + 1] = has_planes ? work.room<S>(layer.out * turn_stride, margin) : blocks_room(layer.out);
    const int64_t rows = i == last && sums_last ? back_inner_of(i) : layer.out;  // of the weight's gradient
    if (has_planes && (want_weights || rows > layer.out)) in_blocks_room[i + 1] = blocks_room(rows);
    if (want_weights && packs_activations<S>) packed_grads[i] = work.room<Packed<S>>(packed_size<S>(rows, most));
    packed[i] = work.room<Packed<S>>(i == 0 && sums_first ? packed_size<S>(inner_of(i), layer.out)
                                                          : packed_size<S>(layer.in, back_inner_of(i)));
    if (layout.taps(i) > 1) turned[i] = work.room<T>(layer.out * inner_of(i));
  }
  const auto gain_room = work.room<T>(out);
  const auto sums_room = work.room<double>(out);
  const auto by_taps_room = work.room<T>(want_weights && sums_last ? out * inner_of(last) : 0);
  const auto sum_room =
      work.room<T>(sums_first ? TapSum<T>::elements(in, layout.taps(0), net.layers[0].window.reach(args.extent), cuts)
                              : in * plane_stride<T>(most),
                   margin);
  work.take();
  shifts.fill(work);

  T* const gain = work[gain_room];
  double* const bias_sums = work[sums_room];
  gain_of(net, gain);
  fill_zero(bias_sums, out);
  Left<S> left[max_net_layers];
  for (int64_t i = 0; i <= last; ++i) {
    const NetLayer<T>& layer = net.layers[i];
    const T* const no_gain = nullptr;
    if (i == 0 && sums_first) {
      left[i] = pack_left<S>(layer.weight, true, inner_of(i), layer.out, work[packed[i]], threads);
    } else {
      const T* const weight = layout.taps(i) > 1 ? by_taps(layer, no_gain, work[turned[i]]) : layer.weight;
      left[i] = pack_left<S>(weight, true, layer.in, back_inner_of(i), work[packed[i]], threads);
    }
  }
  std::optional<TapSum<T>> sum;
  const T* const no_bias = nullptr;
  if (sums_first) sum.emplace(*shifts[0], true, in, no_bias, cuts, work[sum_room]);
  const int64_t own = in - args.cond_channels;

  for (int64_t t = 0; t < cuts.turns(); ++t) {
    const Turn turn = cuts.turn(t);
    const Cut whole{0, turn.pixels};
    const bool has_planes = layout.has_gradient_planes(net.count);
    // The output's gradient, times the gain, and the sums of its rows.
    const auto read_gradient = [&](const Cut& cut, const Matrix<S>& to) {
      read_image(args.grad_y, args.extent, turn.sample, out, cut.begin, cut.end,
                 net.log_gain == nullptr ? nullptr : static_cast<const T*>(gain), to, 0, threads);
      if (want_weights) add_row_sums(read_only(to), out, cut.count(), bias_sums, threads);
    };
    if (has_planes) read_gradient(whole, by_rows(work[output_grad], turn_stride));
    if (want_weights && layout.has_planes(0)) read_input(args, layout, turn, whole, work[input], threads);
    if (sums_first) sum->begin();

    const auto activations = [&](int64_t b, const Cut& cut) {
      if (b == 0) return read_only(layout.part(work[input], 0, false, turn, cut));
      return layout.part(layout.kept(kept, b, false), b, true, turn, cut);
    };
    const auto gradient = [&](int64_t b, const Cut& cut) {
      S* const memory = b == net.count ? work[output_grad] : work[grads[b]];
      return layout.has_gradient_planes(b) ? by_rows(memory + cut.begin, turn_stride)
                                           : in_whole_blocks(memory, layout.channels(b));
    };
    // The gradient behind layer i as its transposed product and its weight's gradient take it.
    const auto right_of = [&](int64_t i, const Cut& cut) {
      const bool gathers = !(i == 0 && sums_first);
      return Right<S>{read_only(gradient(i + 1, cut)), gathers ? shifts[i] : nullptr, true, cut.begin};
    };

    const auto to_input = [&](const Cut& cut, const Right<S>& right) {
      ProductArgs<S, T> product{.a = left[0],
                                .b = right,
                                .c = {},
                                .rows = in,
                                .columns = cut.count(),
                                .inner = sums_first ? net.layers[0].out : back_inner_of(0)};
      if (sums_first) {
        product.rows = inner_of(0);
        product.c = sum->product(cut);
        multiply(product, threads);
        sum->add(cut, cut.end == turn.pixels, threads, [&](int64_t p, int64_t n) {
          const Pieces x(args.grad_x, args.extent, turn.sample, p, n),
              cond(args.grad_cond, args.extent, turn.sample, p, n);
          return [&args, x, cond, own](int64_t channel, const T* values) {
            channel < own ? x.write(values, args.grad_x.data + channel * args.grad_x.channel)
                          : cond.write(values, args.grad_cond.data + (channel - own) * args.grad_cond.channel);
          };
        });
        return;
      }
      const int64_t stride = plane_stride<T>(most);
      T* const planes = work[sum_room];
      if (args.cond_channels == 0) {
        multiply_to_image(product, args.grad_x, args.extent, turn, cut, planes, stride, threads);
        return;
      }
      product.c = by_rows(planes, stride);
      multiply(product, threads);
      const Matrix<const T> x = read_only(product.c),
                            cond = by_rows(static_cast<const T*>(planes + own * stride), stride);
      write_planes(x, args.grad_x, args.extent, turn.sample, own, cut.begin, cut.end, threads);
      write_planes(cond, args.grad_cond, args.extent, turn.sample, args.cond_channels, cut.begin, cut.end, threads);
    };

    // += the gradient behind layer i times the activations before it, turned, and the sums of the gradient's rows.
    const auto weight_gradient = [&](int64_t i, const Cut& cut, const Matrix<const S>& grad) {
      const bool by_tap = i == last && sums_last;
      const int64_t rows = by_tap ? back_inner_of(i) : net.layers[i].out,
                    columns = by_tap ? net.layers[i].in : inner_of(i);
      ProductArgs<S, T> product{
          .a = left_of<S>(grad, rows, cut.count(), packs_activations<S> ? work[packed_grads[i]] : nullptr, threads),
          .b = {activations(i, cut), by_tap ? nullptr : shifts[i], false, cut.begin},
          .turned = true,
          .c = by_rows(by_tap ? work[by_taps_room] : args.grad_weight[i], columns),
          .rows = rows,
          .columns = columns,
          .inner = cut.count(),
          .accumulate = turn.first + cut.begin > 0};
      if (i < last) {
        product.summed = grad;
        product.row_sums = args.grad_bias[i];
      }
      return product;
    };

    for (int64_t first = last; first >= 0;) {
      int64_t end = first - 1;  // before the layers that run from cut to cut
      while (end >= 0 && !layout.has_gradient_planes(end + 1)) --end;
      cuts.for_cuts(turn, [&](const Cut& cut) {
        ProductArgs<S, T> products[max_net_layers];
        int64_t n_products = 0;
        if (first == last && !has_planes) {
          const Matrix<S> to = gradient(net.count, cut);
          read_gradient(cut, to);
          end_with_zeros(to, out, cut.count());
        }
        if (want_weights && end < 0 && !layout.has_planes(0)) read_input(args, layout, turn, cut, work[input], threads);
        for (int64_t i = first; i > end; --i) {
          Right<S> right = right_of(i, cut);
          Matrix<const S> grad = right.matrix;
          if (i == last && sums_last) {  // two products want its columns
            const auto columns = in_whole_blocks(work[in_blocks_room[i + 1]], back_inner_of(i));
            write_columns(right, back_inner_of(i), cut.count(), columns, threads);
            grad = read_only(columns);
            right = {grad, nullptr, false, cut.begin};
          } else if (want_weights && layout.has_gradient_planes(i + 1)) {
            const auto blocks = in_whole_blocks(work[in_blocks_room[i + 1]], net.layers[i].out);
            write_columns(Right<S>{grad, nullptr, false, cut.begin}, net.layers[i].out, cut.count(), blocks, threads);
            grad = read_only(blocks);
          }
          if (i == 0) {
            to_input(cut, right);
          } else {
            const NetLayer<T>& before = net.layers[i - 1];
            ProductArgs<S, S> product{.a = left[i],
                                      .b = right,
                                      .c = gradient(i, cut),
                                      .rows = net.layers[i].in,
                                      .columns = cut.count(),
                                      .inner = back_inner_of(i)};
            if (before.activation != Activation::none) {
              set_activation(before, product.after);
              product.after.derivative =
                  layout.part(layout.kept(kept, i, keeps_input(before.activation)), i, true, turn, cut);
            }
            multiply(product, threads);
            if (!layout.has_gradient_planes(i)) end_with_zeros(product.c, product.rows, cut.count());
          }
          if (want_weights) products[n_products++] = weight_gradient(i, cut, grad);
        }
        matrix_products(products, n_products, threads);
      });
      first = end;
    }
  }
  if (!want_weights) return;
  const NetLayer<T>& layer = net.last();
  const int64_t taps = layout.taps(last);
  const T* const from = work[by_taps_room];
  T* to = args.grad_weight[last];
  const T* w = layer.weight;
  for (int64_t k = 0; k < out; ++k) {
    double along = 0;
    if (sums_last) {
      for (int64_t i = 0; i < layer.in; ++i)
        for (int64_t s = 0; s < taps; ++s) to[i * taps + s] = from[(k * taps + s) * layer.in + i];
    }
    if (args.grad_log_gain != nullptr)
      for (int64_t i = 0; i < layer.in * taps; ++i) along += to[i] * w[i];
    to += layer.in * taps;
    w += layer.in * taps;
    args.grad_bias[last][k] = static_cast<T>(bias_sums[k]);
    if (args.grad_log_gain != nullptr)
      args.grad_log_gain[k] = static_cast<T>(3.0 * (along + bias_sums[k] * layer.bias[k]));
  }
}

}  // namespace

template <class T>
void net_chain(const NetArgs<T>& args, const Threads& threads) {
  if constexpr (sizeof(T) == sizeof(float))
    if (args.net.half) return run<T, BFloat16>(args, threads);
#if !defined(PYGLOW_HALF_ONLY)
  run<T, T>(args, threads);
#endif
}

template <class T>
void net_chain_backward(const NetBackwardArgs<T>& args, const Threads& threads) {
  if constexpr (sizeof(T) == sizeof(float))
    if (args.net.half) return run_backward<T, BFloat16>(args, threads);
#if !defined(PYGLOW_HALF_ONLY)
  run_backward<T, T>(args, threads);
#endif
}

PYGLOW_CPU_INSTANTIATE(net_chain, NetArgs)
PYGLOW_CPU_INSTANTIATE(net_chain_backward, NetBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
