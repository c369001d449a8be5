"""normflows' GlowBlock, by class: actnorm, 1x1 convolution and coupling. Its ``inverse`` is from data to latents.

    u = W ((x - t) exp(-s)),  z1 = u1,  z2 = (u2 - shift) / scale

W is plain, or P (tril(L, -1) + I) (triu(U, 1) + diag(sign_S exp(log_S))); shift and raw are the even and odd channels
of param_map(u1); scale is exp(raw), 1 / sigmoid(raw + 2) ("sigmoid"), sigmoid(raw + 2) ("sigmoid_inv"), or 1 without
``scale``, where all channels are shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._tracing import is_watched
from pyglow_fast.interop.known_net import LOG_MAPS, Affine, qualified
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.table import (
    SMALL,
    Call,
    Element,
    Library,
    Row,
    UnfitError,
    by_class,
    is_set,
    mapped,
    pays_for_images,
    read_once,
    untouched,
    wrapped,
)
from pyglow_fast.nets.chain import Outputs
from pyglow_fast.reference import CouplingSpec, full_precision, full_product, plu_weight
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap

__all__ = ["LIBRARY"]

# The classes of a block's parts and of a coupling's, behind the name of the package: antsnormflows has them too.
_ACTNORM, _COUPLING = "flows.normalization.ActNorm", "flows.affine.coupling.AffineCouplingBlock"
_BLOCKS = [[_ACTNORM, f"flows.mixing.{conv}", _COUPLING] for conv in ("Invertible1x1Conv", "Invertible1x1x1Conv")]
_COUPLINGS = ["flows.reshape.Split", "flows.affine.coupling.AffineCoupling", "flows.reshape.Merge"]


def _names(modules: Iterable[nn.Module]) -> list[str]:
    return [qualified(type(module)).partition(".")[2] for module in modules]


def parts(block: Any) -> list[Any]:
    """The actnorm, the 1x1 convolution and the coupling of a block; antsnormflows' have them in this order."""
    return list(block.flows)[:: 1 if hasattr(block.flows[0], "s") else -1]


def unfit(block: Any) -> str:
    """Why a block is not as its constructor makes one of two channels or more that it splits."""
    if _names(parts(block)) not in _BLOCKS:
        return "not a coupling, a 1x1 convolution and an actnorm, as a GlowBlock has them"
    actnorm, conv, coupling = parts(block)
    if actnorm.s.shape != (1, conv.num_channels, *[1] * (actnorm.s.dim() - 2)):
        return "an actnorm of another shape than one value for each channel"
    if _names(coupling.flows) != _COUPLINGS:
        return "a coupling that is not as its constructor makes it"
    modes = {coupling.flows[0].mode, coupling.flows[2].mode}
    return "" if modes == {"channel"} else f"a coupling that splits by {', '.join(sorted(modes))}"


def actnorms(block: Any) -> list[Any]:
    """Those of a block and of its net, which see their first batch in either direction, in evaluation too."""
    actnorm, _, coupling = parts(block)
    inside = coupling.flows[1].param_map.modules()
    return [actnorm, *(module for module in inside if hasattr(module, "data_dep_init_done"))]


def has_seen(norm: Any) -> bool:
    """Whether an actnorm has seen the data that it waits for."""
    return bool(read_once(norm, "flag", norm.data_dep_init_done, is_set))


def inside(block: Any) -> list[nn.Module]:
    """The modules of a block whose forward is no longer called, besides its net's convolutions."""
    return [*block.flows, *parts(block)[2].flows, *actnorms(block)]


def _called(inverse: bool, block: Any, z: Tensor) -> Call | None:
    actnorm, conv, _ = parts(block)
    fits = isinstance(z, Tensor) and z.dim() == actnorm.s.dim() and z.shape[1] == conv.num_channels
    return Call(z, inverse, lambda out, log_det: (out, log_det)) if fits else None


CALLS = {"forward": partial(_called, True), "inverse": partial(_called, False)}  # latents -> data is their forward


def example(block: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    """Calls of a block for a probe, see Row."""
    for norm in actnorms(block):
        norm.data_dep_init_done.fill_(1.0)
    actnorm, conv, _ = parts(block)
    return [(method, (draw(2, conv.num_channels, *SMALL[actnorm.s.dim() - 2]),), {}) for method in CALLS]


class ConvNet(Net):
    """A net whose actnorms do not read their flags where torch traces or transforms: the block has looked at them."""

    def forward(self, x1: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map the kept channels to shift and raw scale (or shift alone)."""
        net: Any = self.net
        is_known = _names([net]) == ["nets.cnn.ConvNet2d"] and untouched(list(net.modules()))
        if not is_watched() or not is_known:
            return super().forward(x1, cond)
        for module in net.net:
            is_norm = _names([module]) == ["utils.nn.ActNorm"]
            x1 = x1 * module.actNorm.s.exp() + module.actNorm.t if is_norm else module(x1)
        return x1 if self.order is None else self.order(x1, 1)


def coupling_of(block: Any, spec: CouplingSpec, outputs: Outputs) -> NetCoupling:
    """The coupling of a block, which scales by spec, its net's outputs being ordered."""
    _, conv, coupling = parts(block)
    kept = (conv.num_channels + 1) // 2
    net = wrapped(block, ConvNet, coupling.flows[1].param_map, outputs)
    return NetCoupling(net, spec, kept, conv.num_channels - kept)


def net_actnorm(log_scale: Callable[[Any], Tensor], module: Any) -> Affine | None:
    """Of an actnorm in a net, which is called forward: log_scale and shift; None while it waits for data."""
    norm = module.actNorm
    return (log_scale(norm), norm.t.flatten()) if has_seen(norm) else None


LOG_MAPS["normflows.utils.nn.ActNorm"] = partial(net_actnorm, lambda norm: norm.s.flatten())


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
ADDITIVE = CouplingSpec(coupling="additive"), Outputs(False, (-1.0, -1.0))


def _elements(block: Any, inverse: bool) -> list[Element]:
    """u = M x + c with M = W diag(exp(-s)), c = -M t, and the coupling."""
    norm, conv, coupling = parts(block)
    affine, s, t = coupling.flows[1], norm.s.flatten(), norm.t.flatten()
    if affine.scale and affine.scale_map not in _MAPS:
        raise UnfitError(f"an unknown scale map {affine.scale_map!r}")
    with full_precision(s):
        if conv.use_lu:
            weight, log_det = plu_weight(conv.P, conv.L, conv.U, conv.log_S, conv.sign_S), conv.log_S.sum()
        else:
            weight, log_det = conv.W, functional.log_abs_det(conv.W)
        matrix = weight * (-s).exp()
        own = mapped(ChannelMap(matrix, -full_product(matrix, t), log_det - s.sum()), inverse)
    return [own, coupling_of(block, *(_MAPS[affine.scale_map] if affine.scale else ADDITIVE))]


LIBRARY = Library(
    "normflows",
    (
        Row(
            "normflows' GlowBlock",
            by_class("normflows.flows.affine.glow.GlowBlock"),
            CALLS,
            _elements,
            example,
            unfit,
            pays=pays_for_images,
            flags=lambda block: [norm.data_dep_init_done for norm in actnorms(block)],
            inside=inside,
        ),
    ),
    homes=("normflows.flows",),
    containers=("Composite", "Reverse"),
    from_latents=True,
)
