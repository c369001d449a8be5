// A coupling net, 3x3 - relu - 1x1 - relu - 3x3 - exp(3 log_gain), as three matrix products over pixels, and their
// gradients. With a leak the relus are leaky. Compiled once per instruction set.
//
// Bias and relu ride in the products, the shifts of the 3x3 convolutions lie around them. Pixels are handled in cuts
// whose hidden activations stay in the second-level cache. Nothing is padded at a cut: the first convolution gathers
// from the image, and the last keeps two rows of its product until the next cut brings their neighbours. A hidden layer
// that is kept is one (hidden, pixels) matrix in blocks per cut, one behind the other.
#include "cpu/isa.h"
#include "cpu/net_parts.h"

namespace pyglow::cpu::PYGLOW_ISA {
namespace {

template <class T>
void fill_zero(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = T(0);
}

template <class T>
void multiply(const ProductArgs<T>& product, const Threads& threads) {
  matrix_products<T>(&product, 1, threads);
}

template <class Args>
Cuts cuts_of(const Args& args, int64_t element_size) {
  return Cuts(args.samples, args.height, args.width, larger(args.net.hidden1, args.net.hidden2), element_size);
}

}  // namespace

template <class T>
void coupling_net(const CouplingNetArgs<T>& args, const Threads& threads) {
  const NetWeights<T>& net = args.net;
  const Cuts cuts = cuts_of(args, sizeof(T));
  if (cuts.count() == 0) return;
  const int64_t most = cuts.most();
  const Left<T> first{net.hidden1, 9 * net.in}, second{net.hidden2, net.hidden1}, third{9 * net.out, net.hidden2};
  Workspace<T> work;
  const int64_t columns_room = work.room(9 * net.in * most),
                sum_room = work.room(ShiftedSum<T>::elements(net.out, cuts));
  const int64_t room1 = work.room(net.hidden1 * most), room2 = work.room(net.hidden2 * most);
  const int64_t left1 = work.room(first.size()), left2 = work.room(second.size()), left3 = work.room(third.size());
  const int64_t gain = work.room(net.out), bias = work.room(net.out), shifted = work.room(9 * net.out * net.hidden2);
  work.take();
  const LastWeight<T> weight(net, work[gain]);
  ShiftedSum<T> sum(args.y, net.out, weight.bias(work[bias]), false, cuts, work[sum_room]);
  const T* const packed1 = first.pack(net.w1, false, work[left1], threads);
  const T* const packed2 = second.pack(net.w2, false, work[left2], threads);
  const T* const packed3 = third.pack(weight.by_shift(work[shifted]), false, work[left3], threads);
  for (int64_t i = 0; i < cuts.count(); ++i) {
    const Cut cut = cuts[i];
    const auto columns = in_blocks(work[columns_room], 9 * net.in, cut);
    const auto layer1 = in_blocks(args.h1 ? args.h1 + net.hidden1 * cut.begin : work[room1], net.hidden1, cut);
    const auto layer2 = in_blocks(args.h2 ? args.h2 + net.hidden2 * cut.begin : work[room2], net.hidden2, cut);
    columns_of(args.x, net.in, cuts, cut, false, columns, threads);
    ProductArgs<T> product = first.times(packed1, columns, layer1, cut.count);
    product.bias = net.b1;
    product.leak = net.leak;
    multiply(product, threads);
    product = second.times(packed2, layer1, layer2, cut.count);
    product.bias = net.b2;
    product.leak = net.leak;
    multiply(product, threads);
    multiply(third.times(packed3, layer2, sum.product(), cut.count), threads);
    sum.add(cut, threads);
  }
}

template <class T>
void coupling_net_backward(const CouplingNetBackwardArgs<T>& args, const Threads& threads) {
  const NetWeights<T>& net = args.net;
  const bool want_weights = args.grad_w1 != nullptr;
  const Cuts cuts = cuts_of(args, sizeof(T));
  if (cuts.count() == 0 && !want_weights) return;
  const int64_t most = cuts.count() == 0 ? 0 : cuts.most(), padded = round_up(most, pixel_block);
  const int64_t sum_size = cuts.count() == 0 ? 0 : ShiftedSum<T>::elements(net.in, cuts);
  // Gradients of activations: a transposed weight times a gradient. Of weights: a gradient, where it lies, times
  // activations, turned.
  const Left<T> third{net.hidden2, 9 * net.out}, second{net.hidden1, net.hidden2}, first{9 * net.in, net.hidden1};
  Workspace<T> work;
  const int64_t columns_room = work.room(9 * net.in * most), grads_room = work.room(9 * net.out * padded);
  const int64_t room1 = work.room(net.hidden1 * padded), room2 = work.room(net.hidden2 * padded);
  const int64_t sum_room = work.room(sum_size);
  const int64_t left1 = work.room(first.size()), left2 = work.room(second.size()), left3 = work.room(third.size());
  const int64_t gain = work.room(net.out), shifted = work.room(9 * net.out * net.hidden2);
  const int64_t grad_shifted = work.room(9 * net.out * net.hidden2), shift_sums = work.room(9 * net.out);
  const int64_t doubles = static_cast<int64_t>(sizeof(double) / sizeof(T)), bias_sums = work.room(net.out * doubles);
  work.take();
  const LastWeight<T> weight(net, work[gain]);
  double* const grad_bias = reinterpret_cast<double*>(work[bias_sums]);
  if (want_weights) {
    fill_zero(args.grad_b1, net.hidden1);
    fill_zero(args.grad_b2, net.hidden2);
    fill_zero(grad_bias, net.out);
  }
  if (cuts.count() == 0) {
    fill_zero(args.grad_w1, net.hidden1 * 9 * net.in);
    fill_zero(args.grad_w2, net.hidden2 * net.hidden1);
    fill_zero(work[grad_shifted], 9 * net.out * net.hidden2);
    weight.gradients(work[grad_shifted], grad_bias, args);
    return;
  }
  const auto grad_columns = in_whole_blocks(work[grads_room], 9 * net.out);
  const auto d1 = in_whole_blocks(work[room1], net.hidden1), d2 = in_whole_blocks(work[room2], net.hidden2);
  ShiftedSum<T> sum(args.grad_x, net.in, nullptr, true, cuts, work[sum_room]);
  const T* const packed1 = first.pack(net.w1, true, work[left1], threads);
  const T* const packed2 = second.pack(net.w2, true, work[left2], threads);
  const T* const packed3 = third.pack(weight.by_shift(work[shifted]), true, work[left3], threads);
  for (int64_t i = 0; i < cuts.count(); ++i) {
    const Cut cut = cuts[i];
    const auto layer1 = in_blocks(args.h1 + net.hidden1 * cut.begin, net.hidden1, cut);
    const auto layer2 = in_blocks(args.h2 + net.hidden2 * cut.begin, net.hidden2, cut);
    columns_of(args.grad_y, net.out, cuts, cut, true, grad_columns, threads);
    ProductArgs<T> product = third.times(packed3, grad_columns, d2, cut.count);
    product.mask = layer2;
    product.leak = net.leak;
    multiply(product, threads);
    product = second.times(packed2, d2, d1, cut.count);
    product.mask = layer1;
    product.leak = net.leak;
    multiply(product, threads);
    multiply(first.times(packed1, d1, sum.product(), cut.count), threads);
    sum.add(cut, threads);
    if (!want_weights) continue;
    const auto columns = in_blocks(work[columns_room], 9 * net.in, cut);
    columns_of(args.x, net.in, cuts, cut, false, columns, threads);
    // total += grad times the activations turned, and to row_sums the sums of grad's rows.
    const auto added = [&](T* total, int64_t rows, const Matrix<T>& grad, const Matrix<const T>& activations,
                           int64_t inputs, T* row_sums) {
      return ProductArgs<T>{.a = read_only(grad),
                            .b = activations,
                            .turned = true,
                            .c = by_rows(total, inputs),
                            .rows = rows,
                            .columns = inputs,
                            .inner = cut.count,
                            .accumulate = i > 0,
                            .row_sums = row_sums};
    };
    fill_zero(work[shift_sums], 9 * net.out);
    const ProductArgs<T> products[] = {
        added(work[grad_shifted], 9 * net.out, grad_columns, layer2, net.hidden2, work[shift_sums]),
        added(args.grad_w2, net.hidden2, d2, layer1, net.hidden1, args.grad_b2),
        added(args.grad_w1, net.hidden1, d1, read_only(columns), 9 * net.in, args.grad_b1)};
    matrix_products<T>(products, 3, threads);
    // Of the nine shifts of a gradient, the sum of the one that is no shift is that of the bias.
    for (int64_t k = 0; k < net.out; ++k) grad_bias[k] += work[shift_sums][9 * k + 4];
  }
  if (want_weights) weight.gradients(work[grad_shifted], grad_bias, args);
}

PYGLOW_CPU_INSTANTIATE(coupling_net, CouplingNetArgs)
PYGLOW_CPU_INSTANTIATE(coupling_net_backward, CouplingNetBackwardArgs)

}  // namespace pyglow::cpu::PYGLOW_ISA
