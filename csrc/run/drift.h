// Drift: how far recomputed states are from the true ones. Formulas and bounds are explained in
// pyglow_fast/runs/drift.py, which has the same functions for steps that Python runs.
#pragma once
#include "run/net.h"

namespace pyglow::run {

// Random signs of positions, in blocks: inner[p % length] outer[p // length]. A sketch has several signs a position.
struct Signs {
  Tensor inner, outer;                // (length,), (blocks,)
  double sum;                         // of all
  Tensor sketch_inner, sketch_outer;  // (length, S), (blocks, S)
  Tensor sketch_sums;                 // (S,)
  bool rounds;                        // torch's settings let products round float32: then they are summed
};

// at::stack and at::cat that also work in a dry run. A single tensor is returned without a copy.
Tensor stacked(const Tensors& parts);
Tensor joined(const Tensors& parts);

Tensor project(const Tensor& x, const Signs& signs);                     // (N, C)
Tensor sketch(const Tensor& x, const Signs& signs);                      // (N, C, S)
Tensor norms(const Tensor& x);                                           // (N, C)
Tensor difference_norms(const Tensor& recomputed, const Tensor& truth);  // (N, C)

// The inverse of a channel map, of one step or stacked.
struct Unmix {
  Tensor matrix;   // (..., C, C), of a gather (..., C)
  Optional index;  // (..., C)
  Tensor offset;   // (..., C)
};

// The sketch (N, C, S) of x, from the sketch of M x + c.
Tensor sketch_before(const Tensor& seen, const Unmix& map, const Signs& signs);

// The largest relative error, a scalar, NaN if a state is; by a sketch.
Tensor sketched_drift(const Tensor& x, const Tensor& seen, const Signs& signs, bool inverse);

// How far the recomputed input of a step is off: the error itself, or what it is found from for several: norms and how
// large the difference from the truth is, or norms and projection.
struct Measure {
  int64_t step;
  Tensor error, norm, difference, projection;
};
using Measures = std::vector<Measure>;
// The largest error over steps one after another, the last first. inverses and seen have one entry a step; a part that
// undoes its maps has no inverses, and its errors are measured on what was seen.
Tensor drift_of(const Measures& measures, const std::optional<Unmix>& inverses, const Optional& seen,
                const Signs& signs);

}  // namespace pyglow::run
