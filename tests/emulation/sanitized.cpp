// Runs every kernel on small grids in memory of the exact size, to be built with a sanitizer. Prints "done" at the end.
#include <cstdio>
#include <deque>
#include <vector>

#include "driver.cpp"
#include "math/half.h"

namespace {

using pyglow::NetType;
using pyglow::Order;
using pyglow::ScaleMap;

constexpr unsigned seed = 3;  // the order of threads that shows missing barriers

// (N, C, P) numbers, the last of which is the last of its allocation; NaN if no kernel has written them yet.
class Values {
 public:
  Values(int64_t n, int64_t c, int64_t p, bool channels_last, bool is_double, NetType type, unsigned phase)
      : size_(n * c * p), is_double_(is_double), type_(type) {
    memory_ = std::malloc(size_ * (type != NetType::state ? 2 : is_double ? 8 : 4));
    for (int64_t i = 0; i < size_; ++i) write(i, phase ? std::sin(i * 0.7 + phase) : NAN);
    view_ = channels_last ? Tensor{memory_, c * p, 1, c} : Tensor{memory_, c * p, p, 1};
  }
  ~Values() { std::free(memory_); }
  Values(const Values&) = delete;

  // As they are, as a net's output, and as images whose squeezed width is `width`.
  operator Tensor() const { return view_; }
  operator Net() const { return {view_, static_cast<int>(type_)}; }
  Image image(int64_t width) const { return {view_, width, 2 * width * view_.position}; }
  operator void*() const { return memory_; }
  void add(int64_t i, double value) const {
    if (is_double_) {
      static_cast<double*>(memory_)[i] += value;
    } else {
      static_cast<float*>(memory_)[i] += static_cast<float>(value);
    }
  }
  bool is_written() const {
    for (int64_t i = 0; i < size_; ++i)
      if (is_nan(i)) return false;
    return true;
  }

 private:
  void write(int64_t i, double value) {
    if (type_ == NetType::state) {
      std::memset(static_cast<char*>(memory_) + i * (is_double_ ? 8 : 4), 0, is_double_ ? 8 : 4);
      return add(i, value);
    }
    pyglow::BFloat16 b;
    pyglow::Float16 f;
    pyglow::math::narrow(static_cast<float>(value), b);
    pyglow::math::narrow(static_cast<float>(value), f);
    static_cast<uint16_t*>(memory_)[i] = type_ == NetType::bfloat16 ? b.bits : f.bits;
  }
  bool is_nan(int64_t i) const {
    if (type_ != NetType::state)
      return (static_cast<uint16_t*>(memory_)[i] & 0x7fff) > (type_ == NetType::bfloat16 ? 0x7f80 : 0x7c00);
    return is_double_ ? std::isnan(static_cast<double*>(memory_)[i]) : std::isnan(static_cast<float*>(memory_)[i]);
  }

  int64_t size_;
  bool is_double_;
  NetType type_;
  void* memory_;
  Tensor view_;
};

struct Shape {
  int64_t n, c, p;
};

// The tensors of one case. What a call is to write is checked after it.
class Case {
 public:
  Case(bool is_double, const Shape& s, bool channels_last) : is_double(is_double), s(s), last(channels_last) {}

  const Values& given(int64_t n, int64_t c, int64_t p, bool channels_last = false, NetType type = NetType::state) {
    return values_.emplace_back(n, c, p, channels_last, is_double, type, ++phase_);
  }
  const Values& wanted(int64_t n, int64_t c, int64_t p, bool channels_last = false, NetType type = NetType::state) {
    wanted_.push_back(&values_.emplace_back(n, c, p, channels_last, is_double, type, 0));
    return *wanted_.back();
  }
  const Values& state() { return given(s.n, s.c, s.p, last); }
  const Values& result() { return wanted(s.n, s.c, s.p, last); }
  const Values& of_channels() { return wanted(1, s.c, 1); }
  Sizes sizes(int64_t transformed = 0) const { return {s.n, s.c, transformed, s.p}; }
  // A permutation whose last element is the last of its allocation.
  const int64_t* permutation() {
    index_.resize(s.c);
    for (int64_t i = 0; i < s.c; ++i) index_[i] = s.c - 1 - i;
    if (s.c > 2) std::swap(index_[0], index_[1]);
    return index_.data();
  }
  void check(const char* name, const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string(name) + ": " + error);
    for (const Values* values : wanted_)
      if (!values->is_written()) throw std::runtime_error(std::string(name) + ": NaN in a result");
    wanted_.clear();
  }

  const bool is_double;
  const Shape s;
  const bool last;

 private:
  unsigned phase_ = 0;
  std::deque<Values> values_;
  std::vector<const Values*> wanted_;
  std::vector<int64_t> index_;
};

// Channel mixing by a matrix and by a permutation. With width > 0 the side away from the coupling nets is images.
void mix(bool is_double, const Shape& s, bool channels_last, int64_t width) {
  Case c(is_double, s, channels_last);
  const int64_t image_c = width ? s.c / 4 : s.c, image_p = width ? 4 * s.p : s.p, added = s.c / 2;
  const auto image = [&] { return c.wanted(s.n, image_c, image_p, c.last).image(width); };
  const Image x = c.given(s.n, image_c, image_p, c.last).image(width);
  const Values &grad = c.state(), &part = c.given(s.n, added, s.p, !c.last);
  const Values &matrix = c.given(1, s.c, s.c), &scale = c.given(1, s.c, 1), &offset = c.given(1, s.c, 1);
  const Map map = {scale, offset, nullptr, c.permutation()}, centred = {scale, nullptr, offset, map.index};
  for (const int subtract_first : {0, 1})
    c.check("channel_mix",
            emulated_channel_mix(is_double, seed, c.sizes(), x, matrix, offset, c.result().image(0), subtract_first));
  if (width > 0)
    c.check("unsqueezed channel_mix",
            emulated_channel_mix(is_double, seed, c.sizes(), grad.image(0), matrix, offset, image(), 0));
  for (const Tensor& some : {Tensor{}, Tensor(part)})
    c.check("channel_mix_backward",
            emulated_channel_mix_backward(is_double, seed, c.sizes(), x, grad, some, some.data ? added : 0, matrix,
                                          offset, image(), c.wanted(1, s.c, s.c), c.of_channels()));
  c.check("gather",
          emulated_gather(is_double, seed, c.sizes(), Variant{}, x, Net{}, map, c.result().image(0), nullptr));
  c.check("gather_backward",
          emulated_gather_backward(is_double, seed, c.sizes(), Variant{}, x, Net{}, grad, part, added, nullptr, centred,
                                   image(), Net{}, c.of_channels(), c.of_channels()));
}

// Couplings alone and in one pass with either kind of channel mixing.
void couple(bool is_double, const Shape& s, bool channels_last, bool net_last, NetType type, ScaleMap scale_map,
            Order order) {
  Case c(is_double, s, channels_last);
  const int64_t transformed = (s.c + 1) / 2, kept = s.c - transformed;
  const int64_t net_channels = scale_map == ScaleMap::none ? transformed : 2 * transformed;
  const Sizes sizes = c.sizes(transformed);
  const Values &x = c.state(), &grad = c.state(), &net = c.given(s.n, net_channels, s.p, net_last, type);
  const Values &weight = c.given(s.n, 1, 1), &part = c.given(s.n, kept, s.p, net_last);
  const Values &matrix = c.given(1, s.c, s.c), &scale = c.given(1, s.c, 1), &offset = c.given(1, s.c, 1);
  const auto net_grad = [&]() -> const Values& { return c.wanted(s.n, net_channels, s.p, net_last, type); };
  const auto log_det = [&]() -> const Values& { return c.wanted(s.n, 1, 1); };
  const Map map = {scale, nullptr, offset, c.permutation()}, uncentred = {scale, nullptr, nullptr, map.index};
  Variant variant = {static_cast<int>(scale_map), static_cast<int>(order), 0, 2, 0.1, 2, 1};
  for (const int inverse : {1, 0}) {
    variant.inverse = inverse;
    c.check("coupling", emulated_coupling(is_double, seed, sizes, variant, x, net, c.result(), log_det()));
    c.check("coupling_backward", emulated_coupling_backward(is_double, seed, sizes, variant, x, net, grad, weight,
                                                            c.result(), c.result(), net_grad()));
    c.check("coupling_mix",
            emulated_coupling_mix(is_double, seed, sizes, variant, x, net, matrix, offset, c.result(), log_det()));
    c.check("gather of a coupling",
            emulated_gather(is_double, seed, sizes, variant, x.image(0), net, map, c.result().image(0), log_det()));
  }
  for (const Tensor& some : {Tensor{}, Tensor(part)})
    c.check(
        "coupling_mix_backward",
        emulated_coupling_mix_backward(is_double, seed, sizes, variant, x, net, grad, some, some.data ? kept : 0,
                                       weight, matrix, c.result(), net_grad(), c.wanted(1, s.c, s.c), c.of_channels()));
  c.check("gather_backward of a coupling",
          emulated_gather_backward(is_double, seed, sizes, variant, x.image(0), net, grad, Tensor{}, 0, weight,
                                   uncentred, c.result().image(0), net_grad(), c.of_channels(), c.of_channels()));
  c.check("step_backward", emulated_step_backward(is_double, seed, sizes, variant, x, net, grad, weight, matrix, offset,
                                                  c.result(), c.result(), net_grad()));
  c.check("step_gather_backward", emulated_step_gather_backward(is_double, seed, sizes, variant, x, net, grad, weight,
                                                                map, c.result(), c.result(), net_grad()));
}

void densities(bool is_double, const Shape& s, bool channels_last, bool repeats) {
  Case c(is_double, s, channels_last);
  const Values &x = c.state(), &log_sd = c.state(), &weight = c.given(s.n, 1, 1), &row = c.given(1, s.c, 1);
  const Tensor mean = repeats ? Tensor{row, 0, 1, 0} : Tensor(c.state());  // for all samples and positions
  c.check("gaussian_log_prob",
          emulated_gaussian_log_prob(is_double, seed, c.sizes(), x, mean, log_sd, c.wanted(s.n, 1, 1)));
  c.check("gaussian_log_prob_backward",
          emulated_gaussian_log_prob_backward(is_double, seed, c.sizes(), x, mean, log_sd, weight, c.result(),
                                              c.result(), c.result()));
  c.check("gaussian_sample", emulated_gaussian_sample(is_double, seed, c.sizes(), x, mean, log_sd, c.result()));
}

// Matrices of sines, which are regular with the number of channels added to the diagonal.
void invert(bool is_double, int64_t count, int64_t channels) {
  Case c(is_double, {count, channels, 1}, false);
  const Values& matrices = c.given(count, channels, channels);
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < channels; ++i)
      matrices.add((k * channels + i) * channels + i, static_cast<double>(channels));
  c.check("invert_matrices", emulated_invert_matrices(is_double, seed, c.sizes(), matrices,
                                                      c.wanted(count, channels, channels), c.wanted(count, 1, 1)));
}

// Convolutions in LU factors that turn the order of the channels round, and actnorms.
void fold(bool is_double, int64_t count, int64_t channels) {
  Case c(is_double, {count, channels, 1}, false);
  std::vector<const void*> table(count, c.permutation());
  for (int part = 0; part < 6; ++part)  // lower, upper; log_diag, sign_diag, log_scale, bias
    for (int64_t k = 0; k < count; ++k) table.push_back(c.given(1, channels, part < 2 ? channels : 1));
  const Values& matrices = c.wanted(count, channels, channels);
  const Values &offsets = c.wanted(count, channels, 1), &log_dets = c.wanted(count, 1, 1);
  c.check("fold", emulated_fold(is_double, seed, c.sizes(), table.data(), matrices, offsets, log_dets));
  const std::vector<const void*> grads = {matrices, offsets, log_dets};
  std::vector<void*> results;
  for (int part = 0; part < 5; ++part) results.push_back(c.wanted(count, channels, part < 2 ? channels : 1));
  c.check("fold_backward",
          emulated_fold_backward(is_double, seed, c.sizes(), table.data(), grads.data(), results.data()));
}

// Vector path and tail; one block and several; several groups and chunks of channels; one sample to several tiles,
// several samples to a tile; blocks that walk several tiles, with samples within a block's range and across two of
// them.
void all(bool is_double) {
  const auto sigmoid = [&](const Shape& s, bool channels_last, NetType type) {
    couple(is_double, s, channels_last, channels_last, type, ScaleMap::sigmoid, Order::shift_scale);
  };
  const int net_types = is_double ? 1 : 3;  // that may be beside the state
  multiprocessors = 1;
  for (const bool last : {false, true}) {
    for (const Shape& s : {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{1, 70, 8}}) {
      mix(is_double, s, last, 0);
      sigmoid(s, last, NetType::state);
    }
    for (const Shape& s : {Shape{2, 4, 15}, Shape{1, 12, 180}, Shape{1, 72, 10}}) mix(is_double, s, last, 5);
    for (const Shape& s : {Shape{2, 4, 16}, Shape{1, 12, 200}, Shape{1, 72, 8}}) mix(is_double, s, last, 8);
  }
  // The cut of small products for a large GPU, and two splits of the positions with several tiles each.
  multiprocessors = 132;
  for (const bool last : {false, true}) {
    for (const Shape& s : {Shape{3, 37, 4}, Shape{1, 70, 8}}) {
      mix(is_double, s, last, 0);
      sigmoid(s, last, NetType::state);
    }
    mix(is_double, {1, 72, 8}, last, 8);
    for (int type = 1; type < net_types; ++type) sigmoid({2, 6, 44}, last, static_cast<NetType>(type));
  }
  for (const Shape& s : {Shape{1, 6, 1204}, Shape{1, 6, 1205}, Shape{90, 2, 1}}) mix(is_double, s, false, 0);
  for (const Shape& s : {Shape{5, 6, 240}, Shape{5, 6, 241}, Shape{90, 2, 1}, Shape{1, 6, 1205}})
    sigmoid(s, false, NetType::state);
  // Patches: halves of two, six, eight and 38 channels; additive ones too.
  for (const Shape& s : {Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 16, 20}, Shape{1, 76, 8}})
    for (int type = 0; type < net_types; ++type)
      for (const ScaleMap map : {ScaleMap::none, ScaleMap::sigmoid})
        couple(is_double, s, false, true, static_cast<NetType>(type), map, Order::shift_scale);
  for (const ScaleMap map : {ScaleMap::none, ScaleMap::sigmoid})  // those of PYGLOW_FEW_MAPS
    for (const Order order : {Order::shift_scale, Order::scale_shift})
      for (const int64_t positions : {4, 5})
        couple(is_double, {2, 4, positions}, false, false, NetType::state, map, order);
  for (const Shape& s :
       {Shape{1, 3, 5}, Shape{2, 4, 16}, Shape{1, 12, 180}, Shape{3, 37, 4}, Shape{3, 6, 601}, Shape{2, 8, 600}})
    for (const bool last : {false, true})
      for (const bool repeats : {false, true}) densities(is_double, s, last, repeats);
  fold(is_double, 66, 3);   // more maps than a launch takes
  fold(is_double, 1, 70);   // more channels than threads
  invert(is_double, 5, 3);  // more matrices than blocks
  invert(is_double, 1, 8);
  invert(is_double, 3, 33);
  invert(is_double, 3, 78);  // in scratch memory
}

}  // namespace

int main() {
  try {
    all(false);
#ifndef EMU_TSAN  // ThreadSanitizer takes its time, and the barriers of both are the same
    all(true);
#endif
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("done\n");
}
