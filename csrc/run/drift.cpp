#include "run/drift.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <limits>

namespace pyglow::run {
namespace {

constexpr double projection_slack = 4;
// Of the largest channel's norm: a channel is not measured against less; see FLOOR of drift.py.
constexpr double least_norm = 1e-6, least_norm_back = 0.25;

double floor_of(bool inverse) { return inverse ? least_norm_back : least_norm; }

Tensor flat(const Tensor& x) { return x.dim() == 2 ? x.unsqueeze(-1) : x.flatten(2); }

// What errors of states with these norms (..., N, C) are measured against: a channel's own norm, but not below the
// batch's typical one, nor below a part of the largest channel's.
Tensor scale_of(const Tensor& norm, bool inverse) {
  if (norm.numel() == 0) return norm;
  const int64_t lower_median = (norm.size(-2) - 1) / 2;  // by sorting: median has no deterministic CUDA kernel
  const Tensor typical = std::get<0>(norm.sort(-2)).narrow(-2, lower_median, 1);
  const double tiny =
      norm.scalar_type() == at::kDouble ? std::numeric_limits<double>::min() : std::numeric_limits<float>::min();
  const Tensor floor = (typical.amax(-1, true) * floor_of(inverse)).clamp_min(tiny);
  return at::maximum(norm, at::maximum(typical, floor));
}

Tensor largest(const Tensor& error) {
  if (error.numel() == 0) return error.new_zeros({});
  return at::linalg_vector_norm(error, std::numeric_limits<double>::infinity());
}

// In float64 where torch's settings let float32 products round.
Tensor exact_product(const Tensor& a, const Tensor& b, bool rounds) {
  if (!rounds) return at::matmul(a, b);
  return at::matmul(a.to(at::kDouble), b.to(at::kDouble)).to(a.scalar_type());
}

Tensor unmixed(const Tensor& moved, const Unmix& map, bool rounds) {
  if (!map.index) return exact_product(moved, map.matrix.mT(), rounds);
  return moved.take_along_dim(map.index->unsqueeze(-2).expand_as(moved), -1) * map.matrix.unsqueeze(-2);
}

// For a dry run, in which torch would ask Python for each op: the memory alone.
Tensor nothing(const Tensor& like, at::IntArrayRef sizes) { return at::empty(sizes, like.options()); }
Tensor no_drift(const Tensor& like) { return nothing(like, {}); }

// What projections of M x + c say of those of x: (K, N, C) by K maps.
Tensor projections_before(const Tensor& seen, const Unmix& map, const Signs& signs) {
  if (seen.is_meta()) return at::empty_like(seen);
  return unmixed(seen - map.offset.unsqueeze(-2) * signs.sum, map, signs.rounds);
}

// The largest relative errors; scalars, NaN if a state is. Of norms (K, N, C).
Tensor anchor_drift(const Tensor& differences, const Tensor& norms, bool inverse) {
  return norms.is_meta() ? no_drift(norms) : largest(differences / scale_of(norms, inverse));
}

Tensor projected_drift(const Tensor& found, const Tensor& norm, const Tensor& seen, bool inverse) {
  if (seen.is_meta()) return no_drift(seen);
  return largest((found - seen) / (scale_of(norm, inverse) * projection_slack));
}

}  // namespace

Tensor stacked(const Tensors& parts) {
  if (!parts[0].is_meta()) return at::stack(parts);
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  sizes.insert(sizes.begin(), static_cast<int64_t>(parts.size()));
  return nothing(parts[0], sizes);
}

Tensor joined(const Tensors& parts) {
  if (parts.size() == 1) return parts[0];
  if (!parts[0].is_meta()) return at::cat(parts);
  std::vector<int64_t> sizes = parts[0].sizes().vec();
  sizes[0] = 0;
  for (const Tensor& part : parts) sizes[0] += part.size(0);
  return nothing(parts[0], sizes);
}

// Block by block: the rounding of one long sum grows with the root of its length, and would be taken for drift.
Tensor project(const Tensor& x, const Signs& signs) {
  const int64_t length = signs.inner.size(0), blocks = signs.outer.size(0);
  if (x.is_meta()) {
    const std::vector<int64_t> sums{x.size(0), x.size(1), blocks};
    const Tensor inside = nothing(x, signs.rounds ? x.sizes() : at::IntArrayRef(sums));
    return nothing(x, {x.size(0), x.size(1)});
  }
  const Tensor f = flat(x);
  if (signs.rounds) return ((f.unflatten(2, {blocks, length}) * signs.inner).sum(3) * signs.outer).sum(2);
  if (blocks <= 1) return at::matmul(f, signs.inner);
  const Tensor by_position = f.transpose(1, 2);
  if (by_position.is_contiguous())  // channels last, of which the other product would make a copy
    return at::matmul(signs.outer, at::matmul(signs.inner, by_position.unflatten(1, {blocks, length})));
  return at::matmul(at::matmul(f.unflatten(2, {blocks, length}), signs.inner), signs.outer);
}

Tensor sketch(const Tensor& x, const Signs& signs) {
  if (x.is_meta()) return nothing(x, {x.size(0), x.size(1), signs.sketch_inner.size(1)});
  const Tensor by_block = flat(x).unflatten(2, {signs.sketch_outer.size(0), signs.sketch_inner.size(0)});
  if (!signs.rounds) return (at::matmul(by_block, signs.sketch_inner) * signs.sketch_outer).sum(2);
  Tensors found;
  for (int64_t i = 0; i < signs.sketch_inner.size(1); ++i)
    found.push_back(((by_block * signs.sketch_inner.select(1, i)).sum(3) * signs.sketch_outer.select(1, i)).sum(2));
  return at::stack(found, 2);
}

Tensor norms(const Tensor& x) {
  if (x.is_meta()) return nothing(x, {x.size(0), x.size(1)});
  return at::linalg_vector_norm(flat(x), 2, {2});
}

Tensor sketch_before(const Tensor& seen, const Unmix& map, const Signs& signs) {
  if (seen.is_meta()) return at::empty_like(seen);
  const Tensor ones = signs.sketch_sums.view({-1, 1, 1});
  return unmixed(seen.movedim(2, 0) - map.offset * ones, map, signs.rounds).movedim(0, 2);
}

Tensor difference_norms(const Tensor& recomputed, const Tensor& truth) {
  return norms(truth.is_meta() ? at::empty_like(truth) : recomputed - truth);
}

Tensor sketched_drift(const Tensor& x, const Tensor& seen, const Signs& signs, bool inverse) {
  if (x.is_meta()) return no_drift(x);
  const double root = std::sqrt(static_cast<double>(seen.size(2)));
  const Tensor error = at::linalg_vector_norm(sketch(x, signs) - seen, 2, {2}) / root;
  return largest(error / scale_of(norms(x), inverse));
}

Tensor drift_of(const Measures& measures, const std::optional<Unmix>& inverses, const Optional& seen,
                const Signs& signs) {
  Tensors errors, differences, truths, projections, all_norms;
  std::vector<std::pair<int64_t, int64_t>> ranges;  // of steps with projections: the first, and how many
  for (auto one = measures.rbegin(); one != measures.rend(); ++one) {
    if (one->error.defined()) {
      errors.push_back(one->error);
    } else if (one->difference.defined()) {
      differences.push_back(one->difference);
      truths.push_back(one->norm);
    } else {
      if (ranges.empty() || ranges.back().first + ranges.back().second != one->step) ranges.emplace_back(one->step, 0);
      ++ranges.back().second;
      projections.push_back(one->projection);
      all_norms.push_back(one->norm);
    }
  }
  const auto of_ranges = [&](const Tensor& all) {
    Tensors parts;
    for (const auto& [first, count] : ranges) parts.push_back(all.narrow(0, first, count));
    return joined(parts);
  };
  if (!differences.empty()) errors.push_back(anchor_drift(stacked(differences), stacked(truths), !inverses));
  if (!projections.empty()) {
    Tensor expected = of_ranges(*seen);
    if (inverses) {
      const Unmix map{of_ranges(inverses->matrix),
                      inverses->index ? Optional(of_ranges(*inverses->index)) : std::nullopt,
                      of_ranges(inverses->offset)};
      expected = projections_before(expected, map, signs);
    }
    errors.push_back(projected_drift(stacked(projections), stacked(all_norms), expected, !inverses));
  }
  return errors.size() == 1 ? errors[0] : stacked(errors).amax();
}

}  // namespace pyglow::run
