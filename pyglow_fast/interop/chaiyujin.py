"""Flow steps of chaiyujin's glow-pytorch and of what derives from it (SRFlow, LLFlow, y0ast's Glow), by structure.

    z = coupling(injector(P exp(logs) (x + bias)))       P: invconv (plain or LU), shuffle or reverse

These classes are in no package of an index: every project has a copy. They are recognised by their attributes: an
actnorm with ``bias``, ``logs`` and ``inited``; ``invconv``, ``shuffle`` or ``reverse``; ``f`` or ``affine``, which may
be absent ("noCoupling"). SRFlow's nets read features, ``rrdbResults``, besides. y0ast's steps have other names,
``block`` with children ``conv``, ``lower`` and ``upper``, and their ``flow_permutation`` is a function that calls the
module: in a copy of a step that is the original's, so a copy runs its own code. The call stays
``step(input, logdet=None, reverse=False)``. The models loop over their steps and ask for the class of each, so steps
are not joined: with a memory mode each keeps its input and output for the backward, and nothing of its nets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.captures import made_once
from pyglow_fast.interop.known_net import KnownNet, Layer
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.table import AS_FAST, Call, Element, Library, Row, wrapped
from pyglow_fast.nets.chain import Outputs
from pyglow_fast.reference import CouplingSpec, fold_actnorm, full_precision, gather_actnorm, n_positions, plu_weight
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap, Map

__all__ = ["LIBRARY"]

# For batches of fewer positions, the work on the parameters takes longer than is gained on the data.
LEAST_POSITIONS, LEAST_WITHOUT_NET = 1600, 6400
LEAST_RATIO = 8  # of the sides of a 3x3 convolution: at 512 to 96 and at 320 to 64 channels the library is as fast
REMEMBERED = 4096  # permutations, C numbers each, of all models of a process
IN_TURN = Outputs(in_turn=True)  # shift, raw, shift, raw, ...
_PERMUTES = ("invconv", "shuffle", "reverse")
WITH_FEATURES = "CondAffineSeparatedAndCond"


def _layer(module: nn.Module) -> Layer | None:
    """A convolution, and behind it exp(logs) (x + bias) of its actnorm, or exp(logscale_factor logs) x."""
    own: Any = module
    conv = own._modules.get("conv", own)
    if not isinstance(conv, nn.Conv2d) or "parametrizations" in conv._modules:
        return None
    if hasattr(own, "actnorm"):
        norm = own.actnorm
        return Layer(conv, lambda: (norm.logs.flatten(), (norm.bias * norm.logs.exp()).flatten()))
    if hasattr(own, "logs"):
        nothing = torch.zeros_like(own.logs).flatten()
        return Layer(conv, lambda: ((own.logs * own.logscale_factor).flatten(), nothing))
    return Layer(conv) if conv is own else None


class OwnNet(Net):
    """A step's net, whose convolutions are of classes of the project's own."""

    layer_of = staticmethod(_layer)


def _looks_like(module: nn.Module) -> bool:
    actnorm = getattr(module, "actnorm", None)
    has_actnorm = isinstance(actnorm, nn.Module) and all(hasattr(actnorm, name) for name in ("bias", "logs", "inited"))
    permutation, coupling = (getattr(module, name, None) for name in ("flow_permutation", "flow_coupling"))
    return has_actnorm and isinstance(permutation, str | FunctionType) and isinstance(coupling, str)


def _permutation(step: Any) -> str:
    """Name the module that a step's flow_permutation names or, being a function, calls; "" if neither is known."""
    named = step.flow_permutation
    if isinstance(named, FunctionType):
        own = [cell.cell_contents for cell in named.__closure__ or ()] == [step]
        named = next((name for name in _PERMUTES if own and name in step._modules), "")
    return named if named in _PERMUTES and isinstance(getattr(step, named, None), nn.Module) else ""


def _unfit(step: Any) -> str:
    channels, kind = step.actnorm.bias.numel(), step.flow_coupling
    if not _permutation(step):
        named = step.flow_permutation
        return f"flow_permutation {named!r}" if isinstance(named, str) else "a flow_permutation that is another step's"
    if kind not in ("affine", "additive", "noCoupling", WITH_FEATURES):
        return f"flow_coupling {kind!r}"
    if kind == WITH_FEATURES and step.affine.channels_for_nn * 2 != channels:
        return f"{channels} channels not halved"
    return f"{channels} channels" if channels % 2 and kind != "noCoupling" else ""


def _couplings(step: Any) -> list[NetCoupling]:
    kind, half = step.flow_coupling, step.actnorm.bias.numel() // 2
    if kind == "noCoupling":
        return []
    if kind == WITH_FEATURES:
        own, spec = step.affine, CouplingSpec("affine", eps=float(step.affine.affine_eps))
        injector = NetCoupling(wrapped(step, OwnNet, own.fFeatures, IN_TURN), spec, 0, 2 * half)
        return [injector, NetCoupling(wrapped(step, OwnNet, own.fAffine, IN_TURN), spec, half, half)]
    own = step.f if hasattr(step, "f") else step.block
    net = wrapped(step, OwnNet, own, IN_TURN if kind == "affine" else None)
    return [NetCoupling(net, CouplingSpec(kind), half, half)]


@made_once(REMEMBERED)
def _order(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Indices that the host knows, on a device: copied once, as a capture allows no copy."""
    return torch.tensor(indices, dtype=torch.int64, device=device)


def _channel_map(step: Any, inverse: bool) -> ChannelMap:
    """Actnorm and permutation, u = P exp(logs) (x + bias), or x = exp(-logs) P^-1 u - bias."""
    log_scale, bias = step.actnorm.logs.flatten(), step.actnorm.bias.flatten()
    if (permutation := _permutation(step)) != "invconv":
        indices = getattr(step, permutation).indices
        on_device = isinstance(indices, Tensor) and indices.device == bias.device
        source = indices.long() if on_device else _order(tuple(map(int, indices)), bias.device)
        if inverse:
            return ChannelMap((-log_scale).exp(), -bias, -log_scale.sum(), source.argsort())
        return ChannelMap(*gather_actnorm(source, log_scale, bias), log_scale.sum(), source)
    conv = step.invconv
    with full_precision(bias):
        if hasattr(conv, "weight"):
            weight, log_det = conv.weight, functional.log_abs_det(conv.weight)
        else:
            lower, upper = (conv.l, conv.u) if hasattr(conv, "l") else (conv.lower, conv.upper)
            weight, log_det = plu_weight(conv.p, lower, upper, conv.log_s, conv.sign_s), conv.log_s.sum()
        log_det = log_scale.sum() + log_det
        if inverse:
            rows = (-log_scale).exp().unsqueeze(1)
            return ChannelMap(functional.invert_matrix(weight) * rows, -bias, -log_det)
        matrix, offset = fold_actnorm(weight[None], log_scale[None], bias[None])
    return ChannelMap(matrix[0], offset[0], log_det)


def _elements(step: Any, inverse: bool) -> list[Element]:
    return [Map.of(_channel_map(step, inverse)), *_couplings(step)]


def _called(
    step: Any, input: Tensor, logdet: Any = None, reverse: bool = False, rrdbResults: Any = None
) -> Call | None:
    """x, logdet -> z, logdet + log|det|; with ``reverse`` z, logdet -> x, logdet - log|det|."""
    features = rrdbResults.get(getattr(step, "position", None)) if isinstance(rrdbResults, Mapping) else rrdbResults
    needs = step.flow_coupling == WITH_FEATURES
    scales = needs or step.flow_coupling == "affine"
    if not isinstance(input, Tensor) or input.dim() != 4 or input.shape[1] != step.actnorm.bias.numel():
        return None
    if (scales and logdet is None) or torch.is_autocast_enabled(input.device.type):
        return None  # theirs adds to None where it has a scale, and says so
    if needs:
        if not isinstance(features, Tensor) or features.dim() != 4 or features.dtype != input.dtype:
            return None
        if (features.shape[0], features.shape[2:]) != (input.shape[0], input.shape[2:]):
            return None

    def give(z: Tensor, log_det: Tensor) -> tuple[Tensor, Any]:
        return z, None if logdet is None else logdet + (log_det if scales else log_det[0])

    return Call(input, reverse, give, features if needs else None)


def _alone(step: Any) -> str:
    """Why the library's convolutions are as fast: products are faster if those with several taps are wide to narrow."""
    for coupling in _couplings(step):
        net: Any = coupling.net
        known: KnownNet | str = net.known()
        if isinstance(known, str):
            return f"a net that runs as it is ({known}): {AS_FAST}"
        wide = [layer for layer in known.layers if max(layer.kernel_size) > 1]
        if any(max(layer.widths) < LEAST_RATIO * min(layer.widths) for layer in wide):
            return f"nets of such widths: {AS_FAST}"
    return ""


def _pays(step: Any, call: Call) -> bool:
    positions, has_nets = call.x.shape[0] * n_positions(call.x), step.flow_coupling != "noCoupling"
    return positions >= (LEAST_POSITIONS if has_nets else LEAST_WITHOUT_NET) and not _alone(step)


def _example(step: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    for module in step.modules():
        if hasattr(module, "inited"):
            module.inited = True
    if isinstance(permute := step.flow_permutation, FunctionType):  # of the original, in a copy
        step.flow_permutation = FunctionType(permute.__code__, permute.__globals__, closure=(CellType(step),))
    channels, more = step.actnorm.bias.numel(), {}
    if step.flow_coupling == WITH_FEATURES:
        more = {"rrdbResults": draw(2, step.affine.fFeatures[0].in_channels, 5, 4)}
    return [("forward", (draw(2, channels, 5, 4), draw(2), reverse), more) for reverse in (False, True)]


LIBRARY = Library(
    "chaiyujin",
    (
        Row(
            "flow step of chaiyujin's",
            _looks_like,
            {"forward": _called},
            _elements,
            _example,
            _unfit,
            alone=_alone,
            pays=_pays,
            waits=lambda step: any(getattr(part, "inited", True) is False and part.training for part in step.modules()),
            inside=lambda step: list(step.modules())[1:],
            inverts_in=(torch.float32, 1e-3),  # whatever the dtype of the model
        ),
    ),
    one_by_one=True,
)
