#include <ATen/ops/empty_like.h>

#include <map>

#include "run/activation.h"

namespace pyglow::run {

Tensor Outputs::of(Tensor own) const {
  if (is_plain()) return own;
  Tensor found = in_turn ? at::empty_like(own) : own;
  for (int64_t i = 0; i < 2; ++i) {
    Tensor half = coupled(found, i);
    if (in_turn) half.copy_(given(own, i));
    if (signs[i] != 1) half.mul_(signs[i]);
    if (caps[i] != 0) half.div_(caps[i]).tanh_().mul_(caps[i]);
  }
  return found;
}

Tensor Outputs::gradient(const Tensor& grad, const Tensor& out) const {
  if (is_plain()) return grad;
  const Tensor found = at::empty_like(grad);
  for (int64_t i = 0; i < 2; ++i) {
    Tensor half = given(found, i);
    half.copy_(coupled(grad, i));
    if (caps[i] != 0) half.mul_(1 - (coupled(out, i) / caps[i]).square());
    if (signs[i] != 1) half.mul_(signs[i]);
  }
  return found;
}

Tensor Outputs::coupled(const Tensor& out, int64_t i) const {
  const int64_t first = i * (out.size(1) / 2);
  return out.narrow(1, first, i == 0 ? out.size(1) / 2 : out.size(1) - first);
}

Tensor Outputs::given(const Tensor& own, int64_t i) const {
  return in_turn ? own.slice(1, i, own.size(1), 2) : coupled(own, i);
}

std::size_t NetForm::first(std::size_t layer) const {
  std::size_t count = 2 * layer;
  for (std::size_t before = 0; before < layer; ++before) count += powers[before] != 0;
  return count;
}

std::size_t NetForm::tensors() const { return first(layers()); }

std::size_t NetForm::kept() const {
  if (way == Way::kernels) return 1;
  std::size_t count = layers();
  for (std::size_t layer = 0; layer + 1 < layers(); ++layer) count += through(*this, layer).keeps_argument();
  return count;
}

std::vector<Chunk> NetForm::chunks_for(const Tensor& x) const {
  if (!x.is_meta()) return chunks;
  std::map<std::array<int64_t, 3>, int> counts;
  std::vector<Chunk> found;
  for (const Chunk& chunk : chunks)
    if (++counts[{chunk.samples, chunk.rows, chunk.takes}] <= 2) found.push_back(chunk);
  return found;
}

}  // namespace pyglow::run
