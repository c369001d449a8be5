"""Blocks of antsnormflows (ANTsX), as ANTsTorch's create_glow_normalizing_flow_model_2d and _3d put them together.

GlowBlock2d / GlowBlock3d, from data to latents (``inverse``): y1 = u1, y2 = (u2 - T(t)) exp(-S(s)) with (t, s) the even
and odd channels of net(u1); w = W y; z = (w - t') exp(-B(s')). S, B and the logarithms in W = P L U are bounded:
cap tanh(. / cap), and T where the block has a shift_cap; U above its diagonal is scaled to a root mean square of at
most u_offdiag_cap. Behind each of the three nan_to_num and a clamp of +-gen_clamp follow: see limits.py.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop.known_net import LOG_MAPS, WRAPPERS, Affine
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.normflows import are, called, example, has_seen
from pyglow_fast.interop.table import Call, Element, Library, Row, by_class, wrapped
from pyglow_fast.layers.coupling import MAX_CLAMP
from pyglow_fast.nets.chain import Outputs
from pyglow_fast.reference import CouplingSpec, full_precision, full_product, plu_weight
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap, Map

__all__ = ["LIBRARY"]

_FLOWS = "antsnormflows.flows"
_ACTNORM, _COUPLING = f"{_FLOWS}.normalization.ActNorm", f"{_FLOWS}.affine.coupling.AffineCouplingBlock"
_CONVOLUTIONS = tuple(f"{_FLOWS}.mixing.{name}" for name in ("Invertible1x1Conv", "Invertible1x1x1Conv"))
_PARTS = f"{_FLOWS}.reshape.Split", f"{_FLOWS}.affine.coupling.AffineCoupling", f"{_FLOWS}.reshape.Merge"


def _bounded(value: Tensor, cap: Any) -> Tensor:
    return value if cap is None else cap * torch.tanh(value / cap)


def _net_actnorm(norm: Any, dims: int) -> Affine | None:
    """Read log_scale and shift of an actnorm in a net, which is called forward; None while it waits for data."""
    own = norm.actNorm
    return (_log_scale(own), own.t.flatten()) if has_seen(own) else None


LOG_MAPS["antsnormflows.utils.nn.ActNorm"] = _net_actnorm
WRAPPERS |= {f"antsnormflows.nets.cnn.ConvNet{dims}d" for dims in (2, 3)}


def _actnorms(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if are([module], _ACTNORM)]


@torch.no_grad()
def _prepare(block: Any, call: Call) -> None:
    """Let a block see what initialises its actnorms, in its own code.

    It is done before ours runs, so that a recomputation of the call, by a checkpoint around it, is the same call.
    """
    own = block._pgf_theirs
    (own.forward if call.inverse else own.inverse)(block, call.x)


def _unfit(block: Any) -> str:
    if not any(are(block.flows, _ACTNORM, conv, _COUPLING) for conv in _CONVOLUTIONS):
        return "other layers than an actnorm, a convolution and a coupling"
    actnorm, conv, coupling = block.flows
    if not are(coupling.flows, *_PARTS):
        return "a coupling of other layers than a split, a coupling and a merge"
    split, affine, merge = coupling.flows
    if (split.mode, merge.mode) != ("channel", "channel") or conv.num_channels % 2:
        return f"a split {split.mode!r} of {conv.num_channels} channels: expected halves of the channels"
    if actnorm.s.shape != (1, conv.num_channels, *[1] * (actnorm.s.dim() - 2)):
        return f"an actnorm of shape {tuple(actnorm.s.shape)}"
    if affine.scale and affine.scale_map not in ("exp", "tanh", "sigmoid"):
        return f"scale map {affine.scale_map!r}: no kernel has it"
    caps = {"s_cap": (affine.s_cap, MAX_CLAMP), "t_cap": (affine.t_cap, math.inf)}
    bad = [name for name, (cap, most) in caps.items() if cap is not None and not 0 < cap <= most]
    return f"{bad[0]} {getattr(affine, bad[0])}: expected a number above 0" if bad else ""


def _coupling(block: Any) -> NetCoupling:
    affine, half = block.flows[2].flows[1], block.flows[1].num_channels // 2
    s_cap, t_cap = affine.s_cap or 0.0, affine.t_cap or 0.0
    if not affine.scale:
        spec, outputs = CouplingSpec("additive"), Outputs(False, (-1.0, -1.0))
    elif affine.scale_map == "sigmoid":
        spec, outputs = CouplingSpec(), Outputs(True, (-1.0, 1.0), (t_cap, s_cap))
    else:
        spec = CouplingSpec(scale_map="tanh", clamp=float(s_cap)) if s_cap else CouplingSpec(scale_map="exp")
        outputs = Outputs(True, (-1.0, -1.0), (t_cap, 0.0))
    return NetCoupling(wrapped(block, Net, affine.param_map, outputs), spec, half, half)


def _log_scale(actnorm: Any) -> Tensor:
    return _bounded(actnorm.s, actnorm.log_s_cap).flatten()


def _weight(conv: Any) -> tuple[Tensor, Tensor]:
    """W (C, C) and log|det W|."""
    if not conv.use_lu:
        return conv.W, functional.log_abs_det(conv.W)
    log_diagonal, above, channels = _bounded(conv.log_S, conv.s_cap), conv.U.triu(1), conv.num_channels
    most = conv.u_offdiag_cap * math.sqrt(channels * (channels - 1) / 2.0)
    above = above * torch.clamp(most / (torch.linalg.vector_norm(above) + 1e-6), max=1.0)
    return plu_weight(conv.P, conv.L, above, log_diagonal, conv.sign_S), log_diagonal.sum()


def _elements(block: Any, inverse: bool) -> list[Element]:
    actnorm, conv, _ = block.flows
    with full_precision(actnorm.s):
        weight, log_det = _weight(conv)
        log_scale, shift = _log_scale(actnorm), actnorm.t.flatten()  # z = diag(exp(-B)) (W y - t')
        scale, log_det = (-log_scale).exp(), log_det - log_scale.sum()
        own = ChannelMap(weight * scale.unsqueeze(1), -shift * scale, log_det)
        if inverse:  # W^-1 (z exp(B) + t') is M^-1 z + W^-1 t'
            matrix = functional.invert_matrix(own.matrix)
            own = ChannelMap(matrix, -full_product(matrix, own.offset), -log_det)
    return [_coupling(block), Map.of(own)]


@torch.no_grad()
def _limit(block: Any) -> Tensor:
    """States below it are within +-gen_clamp between convolution and actnorm too, w = z exp(B) + t'."""
    actnorm = block.flows[0]
    return (block._gen_clamp - actnorm.t.abs().amax()) / _log_scale(actnorm).abs().amax().exp()


LIBRARY = Library(
    "antsnormflows",
    (
        Row(
            "GlowBlock of antsnormflows",
            by_class(*(f"{_FLOWS}.affine.glow.GlowBlock{dims}d" for dims in (2, 3))),
            {"forward": partial(called, True), "inverse": partial(called, False)},
            _elements,
            example,
            _unfit,
            inside=lambda block: [*block.flows, *block.flows[-1].flows, *_actnorms(block)],
            waits=lambda block: not all(map(has_seen, _actnorms(block))),
            prepare=_prepare,
            limit=_limit,
        ),
    ),
    homes=(_FLOWS,),
    containers=("Composite", "Reverse"),
    from_latents=True,
    # Their checkpointing would run a joined run twice, which needs none: it recomputes by itself.
    off_while_joined="_grad_checkpoint_override",
)
