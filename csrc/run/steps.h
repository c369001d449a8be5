// One step's kernels with its tensors, as forward and backward call them.
#pragma once
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
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

// A tensor that chunks give part by part; nothing is copied if there is one.
class Gathered {
 public:
  explicit Gathered(const Tensor& like) : like_(like) {}
  void put(const Chunk* chunk, const Tensor& part) {
    if (chunk == nullptr) {
      value_ = part;
      return;
    }
    if (!value_.defined()) value_ = at::empty_like(like_);
    chunk->outputs(value_).copy_(part);
  }
  Tensor get() { return std::move(value_); }

 private:
  const Tensor& like_;
  Tensor value_;
};

inline Tensor outputs(const Chunk* chunk, const Tensor& y) { return chunk == nullptr ? y : chunk->outputs(y); }
inline Tensor per_sample(const Chunk* chunk, const Tensor& values) {
  return chunk == nullptr ? values : chunk->per_sample(values);
}

// Says what the gradient of a chunk's net output is.
using Consume = std::function<Tensor(const Tensor& net_out, const Chunk* chunk)>;
// The gradients of a net that is cut into chunks, which run again.
NetGradients net_gradients(const Step& step, const Net& net, const Tensor& state, const Optional& cond, bool wants_cond,
                           const Wanted& wanted, const Consume& consume);

}  // namespace pyglow::run
