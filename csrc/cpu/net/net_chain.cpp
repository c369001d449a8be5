// A coupling net, a chain of convolutions (or products, where a sample is one pixel), as matrix products over pixels.
// Compiled once per instruction set. Bias and activation ride in the products; a hidden layer that is kept lies one
// turn or cut behind the other. See layout.h for the schedule.
#include "cpu/isa.h"
#include "cpu/net/layout.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

template <class T, class S>
class Forward {
 public:
  Forward(const NetArgs<T>& args, const Threads& threads)
      : args_(args),
        threads_(threads),
        layout_(args.net, args.samples, args.extent),
        last_(args.net.count - 1),
        sums_last_(layout_.sums_last()),
        shifts_(layout_, work_) {}

  void run() {
    if (layout_.cuts.turns() == 0) return;
    take_memory();
    pack();
    for (int64_t t = 0; t < layout_.cuts.turns(); ++t) {
      turn_ = layout_.cuts.turn(t);
      if (layout_.has_planes(0)) read_input(args_, layout_, turn_, {0, turn_.pixels}, work_[input_], threads_);
      if (sums_last_) sum_->begin();
      for (int64_t first = 0; first <= last_;) {
        int64_t end = first + 1;
        while (end <= last_ && !layout_.has_planes(end)) ++end;
        run_layers(first, end);
        first = end;
      }
    }
  }

 private:
  const NetChain<T>& net() const { return args_.net; }
  const NetLayer<T>& layer(int64_t i) const { return args_.net.layers[i]; }
  int64_t inner(int64_t i) const { return layer(i).in * layout_.taps(i); }
  int64_t out() const { return net().last().out; }
  bool keeps() const { return args_.kept != nullptr; }

  void take_memory() {
    const Cuts& cuts = layout_.cuts;
    const int64_t margin = layout_.margin(), taps = layout_.taps(last_);
    input_ = work_.room<S>(layout_.part_elements(0), margin);
    for (int64_t i = 0; i <= last_; ++i) {
      if (i > 0 && !keeps()) hidden_[i] = work_.room<S>(layout_.part_elements(i), margin);
      packed_[i] = work_.room<Packed<S>>(i == last_ && sums_last_ ? packed_size<S>(out() * taps, layer(i).in)
                                                                  : packed_size<S>(layer(i).out, inner(i)));
    }
    gain_ = work_.room<T>(out());
    bias_ = work_.room<T>(out());
    weight_ = work_.room<T>(out() * inner(last_));
    turned_ = work_.room<T>(sums_last_ ? out() * inner(last_) : 0);
    sum_room_ =
        work_.room<T>(sums_last_ ? TapSum<T>::elements(out(), taps, net().last().window.reach(args_.extent), cuts)
                                 : out() * plane_stride<T>(cuts.most_in_cut()),
                      margin);
    work_.take();
    shifts_.fill(work_, threads_);
  }

  // The last weight and bias are those times the gain.
  void pack() {
    T* const gain = work_[gain_];
    T* const bias = work_[bias_];
    gain_of(net(), gain);
    NetLayer<T> scaled = net().last();
    for (int64_t k = 0; k < out(); ++k) bias[k] = gain[k] * scaled.bias[k];
    if (net().log_gain != nullptr) {
      T* const weight = work_[weight_];
      const int64_t size = inner(last_);
      for (int64_t k = 0; k < out(); ++k)
        for (int64_t j = 0; j < size; ++j) weight[k * size + j] = gain[k] * scaled.weight[k * size + j];
      scaled.weight = weight;
    }
    for (int64_t i = 0; i <= last_; ++i) {
      const NetLayer<T>& own = i == last_ ? scaled : layer(i);
      left_[i] = i == last_ && sums_last_
                     ? pack_left<S>(by_taps(own, work_[turned_], threads_), false, out() * layout_.taps(i), own.in,
                                    work_[packed_[i]], threads_)
                     : pack_left<S>(own.weight, false, own.out, inner(i), work_[packed_[i]], threads_);
    }
    if (sums_last_)
      sum_.emplace(*shifts_[last_], false, out(), static_cast<const T*>(bias), layout_.cuts, work_[sum_room_]);
  }

  // What lies at a boundary, of a cut.
  Matrix<S> boundary(int64_t b, const Cut& cut) const {
    if (b == 0) return layout_.part(work_[input_], 0, false, turn_, cut);
    return keeps() ? layout_.part(layout_.kept(static_cast<S*>(args_.kept), b, false), b, true, turn_, cut)
                   : layout_.part(work_[hidden_[b]], b, false, turn_, cut);
  }

  // Layers [first, end), of which none but the first looks at planes, from cut to cut.
  void run_layers(int64_t first, int64_t end) {
    layout_.cuts.for_cuts(turn_, [&](const Cut& cut) {
      if (first == 0 && !layout_.has_planes(0)) read_input(args_, layout_, turn_, cut, work_[input_], threads_);
      for (int64_t i = first; i < end; ++i) i == last_ ? run_last(cut) : run_hidden(i, cut);
    });
  }

  void run_hidden(int64_t i, const Cut& cut) {
    const NetLayer<T>& own = layer(i);
    ProductArgs<S, S> product{.a = left_[i],
                              .b = {read_only(boundary(i, cut)), shifts_[i], false, cut.begin},
                              .c = boundary(i + 1, cut),
                              .rows = own.out,
                              .columns = cut.count(),
                              .inner = inner(i)};
    product.after.bias = own.bias;
    set_activation(own, product.after);
    if (keeps() && keeps_input(own.activation))
      product.after.argument =
          layout_.part(layout_.kept(static_cast<S*>(args_.kept), i + 1, true), i + 1, true, turn_, cut);
    multiply(product, threads_);
  }

  void run_last(const Cut& cut) {
    ProductArgs<S, T> product{
        .a = left_[last_],
        .b = {read_only(boundary(last_, cut)), sums_last_ ? nullptr : shifts_[last_], false, cut.begin},
        .c = {},
        .rows = out(),
        .columns = cut.count(),
        .inner = inner(last_)};
    if (!sums_last_) {
      product.after.bias = work_[bias_];
      multiply_to_image(product, args_.y, args_.extent, turn_, cut, work_[sum_room_],
                        plane_stride<T>(layout_.cuts.most_in_cut()), threads_);
      return;
    }
    product.rows = out() * layout_.taps(last_);
    product.inner = layer(last_).in;
    product.c = sum_->product(cut);
    multiply(product, threads_);
    sum_->add(cut, cut.end == turn_.pixels, threads_, [&](int64_t p, int64_t count) {
      const Pieces pieces(args_.y, args_.extent, turn_.sample, p, count);
      return [this, pieces](int64_t channel, const T* values) {
        pieces.write(values, args_.y.data + channel * args_.y.channel);
      };
    });
  }

  const NetArgs<T>& args_;
  const Threads& threads_;
  const Layout<T, S> layout_;
  const int64_t last_;
  const bool sums_last_;
  Workspace work_;
  AllShifts<T, S> shifts_;
  Workspace::Room<S> input_, hidden_[max_net_layers];
  Workspace::Room<Packed<S>> packed_[max_net_layers];
  Workspace::Room<T> gain_, bias_, weight_, turned_, sum_room_;
  Left<S> left_[max_net_layers];
  std::optional<TapSum<T>> sum_;
  Turn turn_{};
};

}  // namespace

template <class T>
void net_chain(const NetArgs<T>& args, const Threads& threads) {
  with_numbers<T>(args.net.half, [&](auto number) { Forward<T, decltype(number)>(args, threads).run(); });
}

PYGLOW_CPU_INSTANTIATE(net_chain, NetArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
