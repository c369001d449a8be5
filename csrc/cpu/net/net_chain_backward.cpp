// The gradients of a coupling net, from what its forward kept. Compiled once per instruction set.
//
// The gradient of what lies before a layer is the product of its transposed weight with that of what lies behind it, as
// the taps see it from the other side, times the derivative of the activation. That of the weight is the product of the
// gradient with the activations before the layer, over pixels: it follows in the same cut, while both are in the cache.
#include "cpu/isa.h"
#include "cpu/net/layout.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

template <class T, class S>
class Backward {
 public:
  Backward(const NetBackwardArgs<T>& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        layout_(args.net, args.samples, args.extent),
        last_(args.net.count - 1),
        sums_last_(layout_.sums_last()),
        sums_first_(layout_.sums_first()),
        want_weights_(args.grad_weight[0] != nullptr),
        turn_stride_(plane_stride<S>(layout_.cuts.most_in_turn())),
        shifts_(layout_, work_) {}

  void run() {
    if (want_weights_) clear_gradients();
    if (layout_.cuts.turns() == 0) return;
    take_memory();
    pack();
    for (int64_t t = 0; t < layout_.cuts.turns(); ++t) {
      turn_ = layout_.cuts.turn(t);
      const Cut whole{0, turn_.pixels};
      if (layout_.has_gradient_planes(net().count)) read_output_gradient(whole);
      if (want_weights_ && layout_.has_planes(0)) read_input(args_, layout_, turn_, whole, work_[input_], threads_);
      if (sums_first_) sum_->begin();
      for (int64_t first = last_; first >= 0;) {
        int64_t end = first - 1;
        while (end >= 0 && !layout_.has_gradient_planes(end + 1)) --end;
        run_layers(first, end);
        first = end;
      }
    }
    if (want_weights_) finish_last();
  }

 private:
  const NetChain<T>& net() const { return args_.net; }
  const NetLayer<T>& layer(int64_t i) const { return args_.net.layers[i]; }
  int64_t inner(int64_t i) const { return layer(i).in * layout_.taps(i); }
  int64_t back_inner(int64_t i) const { return layer(i).out * layout_.taps(i); }
  int64_t out() const { return net().last().out; }
  int64_t in() const { return layer(0).in; }
  int64_t own_in() const { return in() - args_.cond_channels; }  // those of x
  // Whether the weight's gradient is by taps: then its rows are those of the gradient's columns.
  bool by_taps_of(int64_t i) const { return i == last_ && sums_last_; }
  int64_t gradient_rows(int64_t i) const { return by_taps_of(i) ? back_inner(i) : layer(i).out; }

  void clear_gradients() {
    for (int64_t i = 0; i <= last_; ++i) {
      fill_zero(args_.grad_bias[i], layer(i).out);
      if (layout_.cuts.turns() == 0) fill_zero(args_.grad_weight[i], layer(i).out * inner(i));
    }
    if (args_.grad_log_gain != nullptr) fill_zero(args_.grad_log_gain, out());
  }

  void take_memory() {
    const Cuts& cuts = layout_.cuts;
    const int64_t margin = layout_.margin(), most = cuts.most_in_cut();
    // Of a left matrix in whole blocks rows may be read for a block of C more.
    const auto blocks_of = [&](int64_t rows) { return work_.room<S>((rows + 32) * round_up(most, pixel_block)); };
    input_ = work_.room<S>(want_weights_ ? layout_.part_elements(0) : 0, margin);
    for (int64_t i = 0; i <= last_; ++i) {
      const bool has_planes = layout_.has_gradient_planes(i + 1);
      gradient_[i + 1] = has_planes ? work_.room<S>(layer(i).out * turn_stride_, margin) : blocks_of(layer(i).out);
      if (has_planes && (want_weights_ || by_taps_of(i))) blocks_[i] = blocks_of(gradient_rows(i));
      if (want_weights_ && packs_activations<S>)
        packed_gradient_[i] = work_.room<Packed<S>>(packed_size<S>(gradient_rows(i), most));
      packed_[i] = work_.room<Packed<S>>(i == 0 && sums_first_ ? packed_size<S>(inner(i), layer(i).out)
                                                               : packed_size<S>(layer(i).in, back_inner(i)));
      if (layout_.taps(i) > 1) turned_[i] = work_.room<T>(layer(i).out * inner(i));
    }
    gain_ = work_.room<T>(out());
    bias_sums_ = work_.room<double>(out());
    block_sums_ = work_.room<T>((round_up(cuts.most_in_turn(), pixel_block) / pixel_block) * out());
    grad_by_taps_ = work_.room<T>(want_weights_ && sums_last_ ? out() * inner(last_) : 0);
    sum_room_ = work_.room<T>(
        sums_first_ ? TapSum<T>::elements(in(), layout_.taps(0), layer(0).window.reach(args_.extent), cuts)
                    : in() * plane_stride<T>(most),
        margin);
    work_.take();
    shifts_.fill(work_, threads_);
    fill_zero(work_[bias_sums_], out());
  }

  void pack() {
    gain_of(net(), work_[gain_]);
    for (int64_t i = 0; i <= last_; ++i) {
      const NetLayer<T>& own = layer(i);
      Packed<S>* const to = work_[packed_[i]];
      if (i == 0 && sums_first_) {
        left_[i] = pack_left<S>(own.weight, true, inner(i), own.out, to, threads_);
      } else {
        const T* const weight = layout_.taps(i) > 1 ? by_taps(own, work_[turned_[i]], threads_) : own.weight;
        left_[i] = pack_left<S>(weight, true, own.in, back_inner(i), to, threads_);
      }
    }
    const T* const no_bias = nullptr;
    if (sums_first_) sum_.emplace(*shifts_[0], true, in(), no_bias, layout_.cuts, work_[sum_room_]);
  }

  // What the forward had at a boundary, of a cut.
  Matrix<const S> activations(int64_t b, const Cut& cut) const {
    if (b == 0) return read_only(layout_.part(work_[input_], 0, false, turn_, cut));
    return layout_.part(layout_.kept(static_cast<const S*>(args_.kept), b, false), b, true, turn_, cut);
  }
  // The gradient there.
  Matrix<S> gradient(int64_t b, const Cut& cut) const {
    S* const memory = work_[gradient_[b]];
    return layout_.has_gradient_planes(b) ? by_rows(memory + cut.begin, turn_stride_)
                                          : in_whole_blocks(memory, layout_.channels(b));
  }

  // The output's gradient, times the gain, and the sums of its rows.
  void read_output_gradient(const Cut& cut) {
    const Matrix<S> to = gradient(net().count, cut);
    const T* const gain = work_[gain_];
    read_image(args_.grad_y, args_.extent, turn_.sample, out(), cut.begin, cut.end, to, 0, threads_, gain);
    if (want_weights_) {
      T* const sums = work_[block_sums_];
      sum_blocks(args_.grad_y, args_.extent, turn_.sample, out(), cut.begin, cut.end, sums, threads_);
      const int64_t blocks = (cut.count() + pixel_block - 1) / pixel_block;
      for (int64_t i = 0; i < blocks; ++i)
        for (int64_t k = 0; k < out(); ++k) work_[bias_sums_][k] += gain[k] * sums[i * out() + k];
    }
    if (!layout_.has_gradient_planes(net().count)) end_with_zeros(to, out(), cut.count());
  }

  // Layers from `first` down to that behind `end`, of which none but the first looks at planes, from cut to cut.
  void run_layers(int64_t first, int64_t end) {
    layout_.cuts.for_cuts(turn_, [&](const Cut& cut) {
      if (first == last_ && !layout_.has_gradient_planes(net().count)) read_output_gradient(cut);
      if (end < 0 && want_weights_ && !layout_.has_planes(0))
        read_input(args_, layout_, turn_, cut, work_[input_], threads_);
      ProductArgs<S, T> of_weights[max_net_layers];
      int64_t count = 0;
      for (int64_t i = first; i > end; --i) {
        const auto [right, left] = factors(i, cut);
        i == 0 ? to_input(cut, right) : to_hidden(i, cut, right);
        if (want_weights_) of_weights[count++] = weight_gradient(i, cut, left);
      }
      matrix_products(of_weights, count, threads_);
    });
  }

  struct Factors {
    Right<S> right;        // of the product that gives the gradient before the layer
    Matrix<const S> left;  // of the one that gives the weight's, in whole blocks
  };
  // The gradient behind a layer.
  Factors factors(int64_t i, const Cut& cut) {
    const Shifts* const shifts = i == 0 && sums_first_ ? nullptr : shifts_[i];
    const Right<S> right{read_only(gradient(i + 1, cut)), shifts, true, cut.begin};
    if (!layout_.has_gradient_planes(i + 1)) return {right, right.matrix};
    if (!want_weights_ && !by_taps_of(i)) return {right, {}};
    const int64_t rows = gradient_rows(i);
    const Matrix<S> blocks = in_whole_blocks(work_[blocks_[i]], rows);
    const Right<S> plain{right.matrix, nullptr, false, cut.begin};
    write_columns(by_taps_of(i) ? right : plain, rows, cut.count(), blocks, threads_);
    if (!by_taps_of(i)) return {right, read_only(blocks)};
    return {{read_only(blocks), nullptr, false, cut.begin}, read_only(blocks)};  // both products want its columns
  }

  void to_hidden(int64_t i, const Cut& cut, const Right<S>& right) {
    ProductArgs<S, S> product{.a = left_[i],
                              .b = right,
                              .c = gradient(i, cut),
                              .rows = layer(i).in,
                              .columns = cut.count(),
                              .inner = back_inner(i)};
    const NetLayer<T>& before = layer(i - 1);
    if (before.activation != Activation::none) {
      set_activation(before, product.after);
      const S* const kept = layout_.kept(static_cast<const S*>(args_.kept), i, keeps_input(before.activation));
      product.after.derivative = layout_.part(kept, i, true, turn_, cut);
    }
    multiply(product, threads_);
    if (!layout_.has_gradient_planes(i)) end_with_zeros(product.c, product.rows, cut.count());
  }

  void to_input(const Cut& cut, const Right<S>& right) {
    const Image<T>&x = args_.grad_x, &cond = args_.grad_cond;
    ProductArgs<S, T> product{
        .a = left_[0], .b = right, .c = {}, .rows = in(), .columns = cut.count(), .inner = back_inner(0)};
    if (sums_first_) {
      product.rows = inner(0);
      product.inner = layer(0).out;
      product.c = sum_->product(cut);
      multiply(product, threads_);
      sum_->add(cut, cut.end == turn_.pixels, threads_, [&](int64_t p, int64_t count) {
        const Pieces of_x(x, args_.extent, turn_.sample, p, count), of_cond(cond, args_.extent, turn_.sample, p, count);
        return [&x, &cond, of_x, of_cond, own = own_in()](int64_t channel, const T* values) {
          channel < own ? of_x.write(values, x.data + channel * x.channel)
                        : of_cond.write(values, cond.data + (channel - own) * cond.channel);
        };
      });
      return;
    }
    const int64_t stride = plane_stride<T>(layout_.cuts.most_in_cut());
    T* const room = work_[sum_room_];
    if (args_.cond_channels == 0) {
      multiply_to_image(product, x, args_.extent, turn_, cut, room, stride, threads_);
      return;
    }
    product.c = by_rows(room, stride);
    multiply(product, threads_);
    const Matrix<const T> first = read_only(product.c), rest = read_only(by_rows(room + own_in() * stride, stride));
    write_planes(first, x, args_.extent, turn_.sample, own_in(), cut.begin, cut.end, threads_);
    write_planes(rest, cond, args_.extent, turn_.sample, args_.cond_channels, cut.begin, cut.end, threads_);
  }

  // Adds up over all cuts; of hidden layers the bias's as well.
  ProductArgs<S, T> weight_gradient(int64_t i, const Cut& cut, const Matrix<const S>& grad) {
    const int64_t rows = gradient_rows(i), columns = by_taps_of(i) ? layer(i).in : inner(i);
    Packed<S>* const packed = packs_activations<S> ? work_[packed_gradient_[i]] : nullptr;
    ProductArgs<S, T> product{.a = left_of<S>(grad, rows, cut.count(), packed, threads_),
                              .b = {activations(i, cut), by_taps_of(i) ? nullptr : shifts_[i], false, cut.begin},
                              .turned = true,
                              .c = by_rows(by_taps_of(i) ? work_[grad_by_taps_] : args_.grad_weight[i], columns),
                              .rows = rows,
                              .columns = columns,
                              .inner = cut.count(),
                              .accumulate = turn_.first + cut.begin > 0};
    if (i < last_) {
      product.summed = grad;
      product.row_sums = args_.grad_bias[i];
    }
    return product;
  }

  // The last layer's: its weight's in the order of the weight, its bias's, and the gain's, 3 (sum w grad_w + b grad_b),
  // as both are gradients of what is multiplied by the gain.
  void finish_last() {
    const NetLayer<T>& own = net().last();
    const int64_t taps = layout_.taps(last_), size = own.in * taps;
    parallel(threads_, own.out, grain_of(size), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        T* const to = args_.grad_weight[last_] + k * size;
        if (sums_last_) {
          const T* const from = work_[grad_by_taps_] + k * size;
          for (int64_t i = 0; i < own.in; ++i)
            for (int64_t s = 0; s < taps; ++s) to[i * taps + s] = from[s * own.in + i];
        }
        const double grad_bias = work_[bias_sums_][k];
        args_.grad_bias[last_][k] = static_cast<T>(grad_bias);
        if (args_.grad_log_gain == nullptr) continue;
        double along = grad_bias * own.bias[k];
        for (int64_t i = 0; i < size; ++i) along += to[i] * own.weight[k * size + i];
        args_.grad_log_gain[k] = static_cast<T>(3.0 * along);
      }
    });
  }

  const NetBackwardArgs<T>& args_;
  const Threads& threads_;
  const Layout<T, S> layout_;
  const int64_t last_;
  const bool sums_last_, sums_first_, want_weights_;
  const int64_t turn_stride_;
  Workspace work_;
  AllShifts<T, S> shifts_;
  Workspace::Room<S> input_, gradient_[max_net_layers + 1], blocks_[max_net_layers];
  Workspace::Room<Packed<S>> packed_[max_net_layers], packed_gradient_[max_net_layers];
  Workspace::Room<T> turned_[max_net_layers], gain_, block_sums_, grad_by_taps_, sum_room_;
  Workspace::Room<double> bias_sums_;
  Left<S> left_[max_net_layers];
  std::optional<TapSum<T>> sum_;
  Turn turn_{};
};

}  // namespace

template <class T>
void net_chain_backward(const NetBackwardArgs<T>& args, const Threads& threads) {
  with_numbers<T>(args.net.half, [&](auto number) { Backward<T, decltype(number)>(args, threads).run(); });
}

PYGLOW_CPU_INSTANTIATE(net_chain_backward, NetBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
