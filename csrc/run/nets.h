// The nets of a part. Work on parameters alone (scaling, layout) is done at once for all nets of one form and shape,
// but for nets by our own kernels, which are cheap to call and come one by one.
#pragma once
#include "run/run.h"

namespace pyglow::run {

class Nets {
 public:
  // `made`: what an earlier one has made of the same tensors.
  Nets(const Part& part, at::TensorList tensors, at::TensorList made = {});

  Net of(int64_t k) const;
  // What the nets compute with, if it is to be kept.
  Tensors made() const;
  // Of all tensors, from the gradients of what was made of them, which are freed on the way; undefined where those are.
  Tensors unfolded(std::vector<NetGradients>& grads, const std::vector<bool>& wants) const;

 private:
  struct Group {
    std::vector<int64_t> steps;
    Tensors scales;  // of each layer, of all its nets
    bool by_rows;
  };
  const NetForm& form(int64_t k) const { return *part_.steps[k].net; }
  bool alike(int64_t a, int64_t b) const;
  Tensors parts(const std::vector<int64_t>& steps, std::size_t at) const;
  Tensors logs(const std::vector<int64_t>& steps, std::size_t layer) const;
  Tensor scale(const std::vector<int64_t>& steps, std::size_t layer) const;
  std::vector<Folded> folded(Group& group) const;
  void unfold(const Group& group, std::vector<NetGradients>& grads, const std::vector<bool>& wants,
              Tensors& found) const;

  const Part& part_;
  at::TensorList tensors_;
  std::vector<std::size_t> first_;  // of each step's tensors
  std::vector<Group> groups_;
  std::vector<Folded> folded_;  // of each step; none by our kernels
};

}  // namespace pyglow::run
