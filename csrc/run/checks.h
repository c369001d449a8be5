// What the entries of a run require, so that no loop reads beside what there is: counts, and what must be there.
// Shapes, dtypes and devices are checked by the ops, each of what it reads. No value is looked at.
#pragma once
#include "run/run.h"

namespace pyglow::run {

// x: the input, or what has its sizes; with squeezes the state is x squeezed.
void check_inputs(const Part& part, const char* name, const Tensor& x, bool squeezes, const Optional& cond,
                  const Maps& maps, at::TensorList nets);
void check_backward(const Part& part, const Maps& maps, at::TensorList nets, const BackwardArgs& args);

}  // namespace pyglow::run
