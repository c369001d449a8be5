// Drift: how far recomputed states are from the true ones. Formulas and bounds are explained in
// pyglow_fast/runs/drift.py, which has the same functions for steps that Python runs.
#pragma once
#include "run/net.h"

namespace pyglow::run {

// Random signs of positions, in blocks: inner[p % length] outer[p // length]; of a sketch several at once.
struct Signs {
  Tensor inner, outer;                // (length,), (blocks,)
  double sum;                         // of all
  Tensor sketch_inner, sketch_outer;  // (length, S), (blocks, S)
  Tensor sketch_sums;                 // (S,)
  bool rounds;                        // torch's settings let products round float32: then they are summed
};

// As at::stack and at::cat, for which torch asks Python in a dry run; one alone is not copied to be joined.
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

// What a sketch (N, C, S) of M x + c says of that of x.
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
// The worst of what was measured of steps one after another, the last first, in one go. inverses, seen: of all steps;
// without inverses, of a part that undoes its maps, what was seen is what is measured.
Tensor drift_of(const Measures& measures, const std::optional<Unmix>& inverses, const Optional& seen,
                const Signs& signs);

}  // namespace pyglow::run
