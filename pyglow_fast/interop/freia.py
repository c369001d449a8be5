"""FrEIA's layers, by class, and blocks like its AllInOneBlock, by structure, in whatever package (anomalib's, for one).

AllInOneBlock: z = R (a coupling(R0 x) + b), y1 = u1, y2 = u2 exp(s) + t / 10, s = clamp tanh(s_net / 10) with u = R0 x,
(s_net, t) = subnet(u1, c), a = global_scale_activation(global_scale), b = global_offset; R is the permutation, hard or
soft, with learned reflections or without; R0 its inverse with ``reverse_permutation``, else the identity. A GIN block
subtracts from s its mean over the sample and has a = 1. In FrEIA's git since August 2023, whose version number is the
same, s = clamp tanh(s_net / (10 clamp)): a probe tells the two apart.

FrEIA computes y = x exp(clamp f(s)) + t, and the kernels y = x s + shift with log s = c tanh(raw / c) or c 0.636
atan(raw), so that with c = |clamp|

    TANH     clamp tanh(s)              = c tanh(raw / c)      raw = clamp s
             clamp tanh(s / clamp)      = c tanh(raw / c)      raw = s
    SIGMOID  clamp 2 (sigmoid(s) - 1/2) = c tanh(raw / c)      raw = clamp s / 2
    ATAN     clamp 0.636 atan(s)        = c 0.636 atan(raw)    raw = sign(clamp) s

Any other f, and a clamp that is out of the kernels' range, becomes a scale map of its own; a clamp that is a tensor,
which may learn, is left to FrEIA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast._core.errors import expect
from pyglow_fast.interop.graphs import joined_graph
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.table import (
    AS_FAST,
    Call,
    Element,
    Library,
    Row,
    UnfitError,
    by_class,
    in_turns,
    one_hot_order,
    read_once,
    wrapped,
)
from pyglow_fast.layers.coupling import MAX_CLAMP
from pyglow_fast.reference import CouplingSpec, full_precision, full_product, n_positions
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap, Map

FEW_POSITIONS = 8  # for samples of fewer the kernels, made for images, are slower: they walk along positions
DENSE_FROM = 128  # channels from which, on the CPU, a product with a soft R costs more than all else but the net
COUPLINGS = "FrEIA.modules.coupling_layers"
SUBNET_GAIN = 0.1  # of the whole output of an AllInOneBlock's subnet


@dataclass(frozen=True)
class ScaleFunction:
    """A scale map log s = clamp f(raw), minus its mean over the sample if ``centred`` (GIN), for a CouplingSpec.

    With ``divides``, log s = clamp f(raw / clamp).
    """

    clamp: float
    activation: Callable[[Tensor], Tensor]
    centred: bool = False
    divides: bool = False

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """s and log s, like raw."""
        log_scale = self.clamp * self.activation(raw / self.clamp if self.divides else raw)
        if self.centred:
            log_scale = log_scale - log_scale.mean(dim=tuple(range(1, raw.dim())), keepdim=True)
        return log_scale.exp(), log_scale


@dataclass(frozen=True)
class ShiftThenRaw:
    """A map of channels, [s | t] -> [gain t | raw_gain s], so many of each."""

    changed: int
    gain: float
    raw_gain: float

    def __call__(self, values: Tensor, dim: int) -> Tensor:
        """The map of the channels in dimension ``dim`` of values, which are left alone; one copy."""
        width = 2 * self.changed
        expect(values.shape[dim] == width, "subnet", f"an output of {width} channels", values.shape[dim])
        raw, shift = values.split(self.changed, dim)
        return torch.cat([times(shift, self.gain), times(raw, self.raw_gain)], dim)


def times(part: Tensor, gain: float) -> Tensor:
    """Multiply part by gain; of 16 bits in float32, so that it is not rounded once more."""
    if gain == 1.0:
        return part
    return (part.float() if part.dtype in (torch.float16, torch.bfloat16) else part) * gain


@functools.lru_cache(64)
def _kind_of(activation: Callable[[Tensor], Tensor]) -> str:
    """Name the clamp of FrEIA's that a user's function is, by its values."""
    at = torch.tensor([1.0, -0.5], dtype=torch.float64, device="cpu")
    known = {"tanh": torch.tanh(at), "atan": 0.636 * torch.atan(at), "sigmoid": 2.0 * (torch.sigmoid(at) - 0.5)}
    found = activation(at)
    return next((name for name, value in known.items() if torch.equal(found, value)), "")


def clamped(
    clamp: Any, activation: Callable[[Tensor], Tensor], centred: bool = False, divides: bool = False
) -> tuple[CouplingSpec, float]:
    """Write y = x exp(clamp f(s)) + t as a CouplingSpec of raw = gain s, and that gain; see :class:`ScaleFunction`."""
    if isinstance(clamp, Tensor):
        raise UnfitError("a clamp that is a tensor")
    own = activation is torch.tanh or getattr(activation, "__module__", "") == COUPLINGS
    kind = _kind_of(activation) if own and not centred and 0 < abs(clamp) <= MAX_CLAMP else ""
    if not kind:
        scale_map = ScaleFunction(clamp, activation, centred, divides)
        return CouplingSpec(scale_map=scale_map, order="scale_shift"), 1.0
    sign = 1.0 if clamp > 0 else -1.0
    gain = {"atan": sign, "sigmoid": 0.5 * clamp, "tanh": 1.0 if divides else float(clamp)}[kind]
    own_map = "atan" if kind == "atan" else "tanh"
    return CouplingSpec(scale_map=own_map, clamp=abs(float(clamp)), order="scale_shift"), gain


def _called(
    layer: Any, x: Sequence[Tensor], c: Sequence[Tensor] | None = (), rev: bool = False, jac: bool = True
) -> Call | None:
    """(x,), c -> (z,), log_det (N,)."""
    state, channels = x[0], sum(_split(layer))
    fits = isinstance(state, Tensor) and state.dim() > 2 and state.shape[1] == channels
    if not fits or n_positions(state) < FEW_POSITIONS:
        return None
    cond = None if not layer.conditional or not c else c[0] if len(c) == 1 else torch.cat(list(c), dim=1)
    return Call(state, rev, lambda z, log_det: ((z,), log_det), cond)


def _called_in_size(layer: Any, x: Sequence[Tensor], *args: Any, **kwargs: Any) -> Call | None:
    """The same of a block that may refuse other sizes than those it was made for."""
    return _called(layer, x, *args, **kwargs) if tuple(x[0].shape[1:]) == tuple(layer.dims_in[0]) else None


def _few(layer: Any) -> str:
    """Why ours runs in no call of a layer, by the size that it is made for; empty if it may."""
    channels, *sizes = layer.dims_in[0]
    if (count := math.prod(sizes)) >= FEW_POSITIONS:
        return ""
    what = f"samples of {count} positions" if sizes else f"vectors of {channels} channels"
    return f"{what}: {AS_FAST}"


def _split(layer: Any) -> tuple[int, int]:
    """The channels that a layer's first net reads, and the others."""
    return tuple(layer.splits) if hasattr(layer, "splits") else (layer.split_len1, layer.split_len2)


# AllInOneBlock

_KNOWN_BY = ("subnet", "splits", "global_scale", "global_offset", "w_perm", "w_perm_inv")
_NEEDS = (
    *("clamp", "GIN", "reverse_pre_permute", "householder", "global_scale_activation", "permute_function"),
    *("in_channels", "input_rank", "conditional", "dims_in"),
)


def _unfit(block: Any) -> str:
    missing = [name for name in _NEEDS if not hasattr(block, name)]
    if missing:
        return f"{type(block).__qualname__} has no {', '.join(missing)}, which an AllInOneBlock has"
    channels, rank = block.in_channels, block.input_rank
    if few := _few(block):
        return few
    if list(block.splits) != [channels - channels // 2, channels // 2] or channels < 2:
        return f"splits {block.splits} of {channels} channels: expected halves"
    if any(getattr(block, name).shape != (1, channels, *[1] * rank) for name in ("global_scale", "global_offset")):
        return f"another global scale or offset than one for each of {channels} channels"
    if not isinstance(block.w_perm, Tensor) or block.w_perm.dim() > 1:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        if block.permute_function is not convolution:
            return "a permute_function of its own"
    return "parametrizations of the block itself" if "parametrizations" in block._modules else ""


def _reflected(block: Any) -> Tensor:
    """w_0 with learned reflections, (C, C); kept as the block itself does, but without its history."""
    with full_precision(block.w_0):
        w = block.w_0
        for v in block.vk_householder:  # w (1 - 2 v v^T / v^T v)
            w = w - torch.outer(full_product(w, v), 2.0 * v / (v @ v))
    block.w_perm = w.detach().reshape(*w.shape, *[1] * block.input_rank)
    block.w_perm_inv = block.w_perm.transpose(0, 1).contiguous()
    return w


def _permutation(block: Any, name: str, reflected: Tensor | None) -> Map:
    """R ("w_perm") or its inverse ("w_perm_inv"): a gather where it is hard and not learned."""
    nothing = ChannelMap.nothing(block.global_offset.flatten())
    if reflected is not None:
        return Map.of(nothing._replace(matrix=reflected if name == "w_perm" else reflected.T, source=None))
    kept = getattr(block, name)
    order = kept if kept.dim() == 1 else None
    if order is None and not kept.requires_grad:
        order = read_once(block, name, kept.flatten(1), one_hot_order)
    if order is None:
        return Map.of(nothing._replace(matrix=kept.flatten(1), source=None))
    return Map.of(nothing._replace(source=order))


def _block_elements(block: Any, inverse: bool, divides: bool) -> list[Element]:
    spec, gain = clamped(block.clamp, torch.tanh, block.GIN, divides)
    kept, changed = block.splits
    order = ShiftThenRaw(changed, SUBNET_GAIN, SUBNET_GAIN * gain)
    coupling = NetCoupling(wrapped(block, Net, block.subnet, order, bool(block.GIN)), spec, kept, changed)
    with full_precision(block.global_scale):
        scale = torch.ones_like(block.global_scale) if block.GIN else block.global_scale_activation(block.global_scale)
        scale, offset = scale.flatten(), block.global_offset.flatten()
        log_det, channels = scale.log().sum(), torch.arange(len(scale), device=scale.device)
    affine = ChannelMap(scale, offset, log_det, channels)  # a y + b
    if inverse:
        affine = ChannelMap(1.0 / scale, -offset / scale, -log_det, channels)
    reflected = _reflected(block) if block.householder else None
    to_latents, to_data = ("w_perm_inv", "w_perm") if inverse else ("w_perm", "w_perm_inv")
    own: list[Element] = [coupling, Map.of(affine), _permutation(block, to_latents, reflected)]
    return [_permutation(block, to_data, reflected), *own] if block.reverse_pre_permute else own


def _is_dense(block: Any) -> bool:
    """Tell whether R is a soft permutation of so many channels that its products decide the time, on the CPU.

    Its first row tells: to look at all of it takes as long as a convolution.
    """
    wide = block.in_channels >= DENSE_FROM and block.w_perm.device.type == "cpu" and not block.householder
    return wide and block.w_perm.dim() > 1 and int(block.w_perm[0].count_nonzero()) > 1


def _alone(block: Any) -> str:
    what = f"a soft permutation of {block.in_channels} channels: {AS_FAST}"
    return what if _is_dense(block) else ""


def _block_example(block: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    sizes = {1: (10,), 2: (3, 4), 3: (2, 2, 3)}[block.input_rank]
    channels, count = block.in_channels, int(getattr(block, "condition_channels", 0))
    block.dims_in = [(channels, *sizes)]
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(channels, generator=generator)
    hard = torch.eye(channels, dtype=torch.float64)[order]
    with torch.no_grad():
        if block.householder:
            block.w_0.copy_(hard)
        elif block.w_perm.dim() == 1:
            block.w_perm.copy_(order), block.w_perm_inv.copy_(order.argsort())
        else:
            v = torch.randn(channels, generator=generator, dtype=torch.float64)
            turned = hard - torch.outer(hard @ v, 2.0 * v / (v @ v)) if block.training else hard
            block.w_perm.copy_(turned.reshape(block.w_perm.shape))
            block.w_perm_inv.copy_(turned.T.reshape(block.w_perm.shape))
    given = {"c": [draw(2, count, *sizes)]} if block.conditional else {}
    return [("forward", [(draw(2, channels, *sizes),)], {"rev": rev, **given}) for rev in (False, True)]


def _block(name: str, divides: bool) -> Row:
    return Row(
        name,
        lambda block: all(hasattr(block, name) for name in _KNOWN_BY) and isinstance(block.subnet, nn.Module),
        {"forward": _called_in_size if divides else _called},
        partial(_block_elements, divides=divides),
        _block_example,
        _unfit,
        _alone,
        lambda block, call: not _is_dense(block),
    )


# Couplings by class


def _two_sided(layer: Any, inverse: bool) -> list[Element]:
    """x1 by subnet2(x2), then x2 by subnet1(y1): two couplings between which the halves change places."""
    first, second = layer.split_len1, layer.split_len2
    spec, gain = clamped(layer.clamp, layer.f_clamp)
    one = NetCoupling(wrapped(layer, Net, layer.subnet2, ShiftThenRaw(first, 1.0, gain)), spec, second, first)
    other = NetCoupling(wrapped(layer, Net, layer.subnet1, ShiftThenRaw(second, 1.0, gain)), spec, first, second)
    return in_turns(one, other, next(layer.parameters()).new_zeros(first + second), inverse)


def _one_sided(layer: Any, inverse: bool) -> list[Element]:
    spec, gain = clamped(layer.clamp, layer.f_clamp)
    kept, changed = _split(layer)
    net = wrapped(layer, Net, layer.subnet, ShiftThenRaw(changed, 1.0, gain))
    return [NetCoupling(net, spec, kept, changed)]


def _coupling_example(layer: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    sizes = {1: (10,), 2: (3, 4), 3: (2, 2, 3)}[layer.ndims - 1]
    given = {"c": [draw(2, layer.condition_length, *sizes)]} if layer.conditional else {}
    return [("forward", [(draw(2, layer.channels, *sizes),)], {"rev": rev, **given}) for rev in (False, True)]


def _coupling(name: str, elements: Callable[[Any, bool], list[Element]]) -> Row:
    def unfit(layer: Any) -> str:
        return _few(layer) or ("" if min(_split(layer)) else "no halves")

    tells = by_class(f"{COUPLINGS}.{name}")
    return Row(f"FrEIA's {name}", tells, {"forward": _called}, elements, _coupling_example, unfit)


__all__ = ["LIBRARY"]

LIBRARY = Library(
    "FrEIA",
    (
        _block("AllInOneBlock", divides=False),
        _block("AllInOneBlock of FrEIA's git", divides=True),
        _coupling("GLOWCouplingBlock", _two_sided),
        _coupling("AffineCouplingOneSided", _one_sided),
    ),
    homes=("FrEIA.modules",),
    containers=("InvertibleModule", "SequenceINN", "GraphINN", "ReversibleGraphNet", "ReversibleSequential"),
    condition=lambda owner, index: (getattr(owner, "conditions", None) or [None] * (index + 1))[index],
    join_graph=joined_graph,
)
