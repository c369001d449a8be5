// One step's kernels with its tensors, as forward and backward call them.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "bindings/ops.h"
#include "run/nets.h"
#include "run/run.h"

namespace pyglow::run {

// Neither recording nor autocast: what a run computes has the dtypes that its forms say.
struct Plain {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// A map of a step; the index of a gather.
struct Map {
  Tensor matrix, offset;
  Optional index;
};
std::vector<Map> unstacked(const Maps& maps);

inline Tensor mixed(const Tensor& x, const Map& map, bool squeezes) {
  return bindings::channel_mix(x, map.matrix, map.offset, false, squeezes ? 1 : 0, map.index);
}
inline std::tuple<Tensor, Tensor> coupled_and_mixed(const bindings::Kind& kind, const Tensor& u, const Tensor& net_out,
                                                    const Map& map) {
  return bindings::coupling_mix(u, net_out, map.matrix, map.offset, kind, map.index);
}

inline Tensor read_by(const Step& step, const Tensor& state) { return state.narrow(1, 0, step.reads); }

// A net's output, in chunks where its form says so; `kept`: whole, with what its backward needs.
Tensor net_output(const Step& step, const Net& net, const Tensor& state, const Optional& cond, Tensors* kept);

}  // namespace pyglow::run
