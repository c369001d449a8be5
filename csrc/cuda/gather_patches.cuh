// The transformed channels of the gathers, where the net's tensors are taken in patches (net_patches.cuh): kernels of
// their own, beside those for the kept channels. Defined for float and double in gather_patches.cu.
#pragma once
#include "cuda/gather.cuh"
#include "cuda/net_patches.cuh"

namespace pyglow::cuda {

// Transformed channels at most: of each a block keeps in shared memory which channel it goes to.
constexpr int64_t most_targets = 8192;

// As net_access; `vector`: of the tensors of the state.
template <class T, class... Data>
NetAccess gather_access(bool vector, int64_t channels, int64_t transformed, int64_t positions,
                        const NetTensor<Data>&... nets) {
  if (!vector || transformed == 0) return {vector ? NetAccess::Path::positions : NetAccess::Path::strided, false};
  const NetAccess access = net_access<T>(channels - transformed, transformed, positions, nets...);
  return access.patches() && transformed > most_targets ? NetAccess{} : access;
}

// Sums of a channel lie in the partials as those of the kept ones do: see BackwardPass.
struct PatchShares {
  int abreast;                // groups of `width` channels that a block has
  int64_t splits, per_split;  // of units of `width` positions, through all samples
  double* partials;           // (2, C, splits)
  bool added_columns;         // see there
};
inline int groups_abreast(int64_t groups) { return groups > 2 ? 4 : groups > 1 ? 2 : 1; }

template <class T>
int gather_patches(const GatherArgs<T>& args, bool wide, const Queue& queue);
template <class T>
int gather_backward_patches(const GatherBackwardArgs<T>& args, bool wide, const PatchShares& shares,
                            const Queue& queue);
template <class T>
int step_gather_backward_patches(const StepGatherBackwardArgs<T>& args, bool wide, const Queue& queue);

}  // namespace pyglow::cuda
