"""normflows' GlowBlock, by class: actnorm, 1x1 convolution and coupling. Its ``inverse`` is from data to latents.

    u = W ((x - t) exp(-s)),  z1 = u1,  z2 = (u2 - shift) / scale

W is plain, or P (tril(L, -1) + I) (triu(U, 1) + diag(sign_S exp(log_S))); shift and raw are the even and odd channels
of param_map(u1); scale is exp(raw), 1 / sigmoid(raw + 2) ("sigmoid"), sigmoid(raw + 2) ("sigmoid_inv"), or 1 without
``scale``, where all channels are shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.tracing import is_watched
from pyglow_fast.interop.known_net import LOG_MAPS, qualified
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.table import (
    Call,
    Element,
    Library,
    Row,
    UnfitError,
    by_class,
    is_set,
    pays_for_images,
    read_once,
    untouched,
    wrapped,
)
from pyglow_fast.nets.chain import Outputs
from pyglow_fast.reference import CouplingSpec, full_precision, full_product, plu_weight
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap, Map

__all__ = ["LIBRARY"]

_BLOCK, _COUPLING = "normflows.flows.affine.glow.GlowBlock", "normflows.flows.affine.coupling.AffineCouplingBlock"
_NORM, _CONV = "normflows.flows.normalization.ActNorm", "normflows.flows.mixing.Invertible1x1Conv"
_AFFINE = "normflows.flows.affine.coupling.AffineCoupling"
_SPLIT, _MERGE = "normflows.flows.reshape.Split", "normflows.flows.reshape.Merge"


class ConvNet(Net):
    """A net whose actnorms do not read their flags where torch traces or transforms: the block has looked at them."""

    def forward(self, x1: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map the kept channels to shift and raw scale (or shift alone)."""
        net: Any = self.net
        is_known = are([net], "normflows.nets.cnn.ConvNet2d") and untouched(list(net.modules()))
        if not is_watched() or not is_known:
            return super().forward(x1, cond)
        for module in net.net:
            is_norm = are([module], "normflows.utils.nn.ActNorm")
            x1 = x1 * module.actNorm.s.exp() + module.actNorm.t if is_norm else module(x1)
        return x1 if self.order is None else self.order(x1, 1)


def reciprocal_sigmoid(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Compute s = 1 / sigmoid(raw + 2) and log s: what "sigmoid_inv" scales by from data to latents."""
    log_scale = -F.logsigmoid(raw + 2.0)
    return log_scale.exp(), log_scale


# From data to latents: (u2 + shift) s.
_MAPS = {
    "exp": (CouplingSpec(scale_map="exp"), Outputs(True, (-1.0, -1.0))),
    "sigmoid": (CouplingSpec(), Outputs(True, (-1.0, 1.0))),
    "sigmoid_inv": (CouplingSpec(scale_map=reciprocal_sigmoid), Outputs(True, (-1.0, 1.0))),
}
_ADDITIVE = CouplingSpec(coupling="additive"), Outputs(False, (-1.0, -1.0))


def are(modules: Sequence[nn.Module], *classes: str) -> bool:
    """Whether modules are exactly of these classes."""
    return tuple(qualified(type(module)) for module in modules) == classes


def _coupling_unfit(block: Any) -> str:
    if not are(block.flows, _SPLIT, _AFFINE, _MERGE):
        return "a coupling that is not as its constructor makes it"
    modes = {block.flows[0].mode, block.flows[2].mode}
    return "" if modes == {"channel"} else f"a coupling that splits by {', '.join(sorted(modes))}"


def _coupling(block: Any) -> NetCoupling:
    affine, channels = block.flows[0].flows[1], block.flows[1].num_channels
    if affine.scale and affine.scale_map not in _MAPS:
        raise UnfitError(f"an unknown scale map {affine.scale_map!r}")
    spec, outputs = _MAPS[affine.scale_map] if affine.scale else _ADDITIVE
    kept = (channels + 1) // 2
    return NetCoupling(wrapped(block, ConvNet, affine.param_map, outputs), spec, kept, channels - kept)


def _dims(block: Any) -> int:
    """The number of dimensions of its states, read from its actnorm's scales."""
    return next((layer.s.dim() for layer in block.flows if hasattr(layer, "s")), 0)


def called(inverse: bool, block: Any, z: Tensor) -> Call | None:
    """Latents -> data is their forward."""
    fits = isinstance(z, Tensor) and z.dim() == _dims(block) and z.shape[1] == block.flows[1].num_channels
    return Call(z, inverse, lambda out, log_det: (out, log_det)) if fits else None


def example(block: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    """A call of each direction, of a block whose actnorms have seen data."""
    for module in block.modules():
        if hasattr(module, "data_dep_init_done"):
            module.data_dep_init_done.fill_(1.0)
    sizes = (3, 4) if _dims(block) == 4 else (2, 2, 3)
    return [(method, (draw(2, block.flows[1].num_channels, *sizes),), {}) for method in ("forward", "inverse")]


# GlowBlock


def _unfit(block: Any) -> str:
    if not are(block.flows, _COUPLING, _CONV, _NORM):
        return "not a coupling, a 1x1 convolution and an actnorm, as a GlowBlock has them"
    if block.flows[2].s.shape != (1, block.flows[1].num_channels, 1, 1):
        return "an actnorm of another shape than one value for each channel"
    return _coupling_unfit(block.flows[0])


def _flags(block: Any) -> list[Tensor]:
    """List the flags of all actnorms, which a first batch sets in either direction, in evaluation too."""
    norms = [block.flows[2], *block.flows[0].flows[1].param_map.modules()]
    return [norm.data_dep_init_done for norm in norms if hasattr(norm, "data_dep_init_done")]


def _inside(block: Any) -> list[nn.Module]:
    coupling, *others = block.flows
    return [coupling, *others, *coupling.flows] if hasattr(coupling, "flows") else [coupling, *others]


def _map(block: Any, inverse: bool) -> Map:
    """u = M x + c with M = W diag(exp(-s)), c = -M t; inverse: x = diag(exp(s)) W^-1 u + t."""
    _, conv, norm = block.flows
    s, t = norm.s.flatten(), norm.t.flatten()
    with full_precision(s):
        if conv.use_lu:
            weight, log_det = plu_weight(conv.P, conv.L, conv.U, conv.log_S, conv.sign_S), conv.log_S.sum()
        else:
            weight, log_det = conv.W, functional.log_abs_det(conv.W)
        log_det = log_det - s.sum()
        if inverse:
            return Map.of(ChannelMap(functional.invert_matrix(weight) * s.exp().unsqueeze(1), t, -log_det))
        matrix = weight * (-s).exp()
        return Map.of(ChannelMap(matrix, -full_product(matrix, t), log_det))


def _elements(block: Any, inverse: bool) -> list[Element]:
    return [_map(block, inverse), _coupling(block)]


def has_seen(norm: Any) -> bool:
    """Tell whether an actnorm has been initialised from data."""
    return bool(read_once(norm, "flag", norm.data_dep_init_done, is_set))


def _net_actnorm(module: Any, dims: int) -> tuple[Tensor, Tensor] | None:
    """Log-scale and offset, (C,), of the actnorm within a ConvNet2d; None if it must be called itself."""
    norm = module.actNorm
    if not are([norm], _NORM) or not untouched([norm]) or not has_seen(norm):
        return None
    return (norm.s.flatten(), norm.t.flatten()) if norm.s.shape == (1, norm.s.numel(), *[1] * dims) else None


LOG_MAPS["normflows.utils.nn.ActNorm"] = _net_actnorm

LIBRARY = Library(
    "normflows",
    (
        Row(
            "normflows' GlowBlock",
            by_class(_BLOCK),
            {"forward": partial(called, True), "inverse": partial(called, False)},
            _elements,
            example,
            _unfit,
            pays=pays_for_images,
            flags=_flags,
            inside=_inside,
        ),
    ),
    homes=("normflows.flows",),
    containers=("Composite", "Reverse"),
    from_latents=True,
)
