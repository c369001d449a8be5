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
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast.interop.known_net import LOG_MAPS, WRAPPERS
from pyglow_fast.interop.normflows import (
    ADDITIVE,
    CALLS,
    actnorms,
    coupling_of,
    example,
    has_seen,
    inside,
    net_actnorm,
    parts,
    unfit,
)
from pyglow_fast.interop.table import Call, Element, Library, Row, by_class, mapped
from pyglow_fast.layers.coupling import MAX_CLAMP
from pyglow_fast.nets.chain import Outputs
from pyglow_fast.reference import CouplingSpec, full_precision, full_product
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap

__all__ = ["LIBRARY"]

_FLOWS = "antsnormflows.flows"


def _bounded(value: Tensor, cap: Any) -> Tensor:
    return value if cap is None else cap * torch.tanh(value / cap)


def _log_scale(actnorm: Any) -> Tensor:
    return _bounded(actnorm.s, actnorm.log_s_cap).flatten()


LOG_MAPS["antsnormflows.utils.nn.ActNorm"] = partial(net_actnorm, _log_scale)
WRAPPERS |= {f"antsnormflows.nets.cnn.ConvNet{dims}d": "net" for dims in (2, 3)}


@torch.no_grad()
def _prepare(block: Any, call: Call) -> None:
    """Let a block see what initialises its actnorms, in its own code.

    It is done before ours runs, so that a recomputation of the call, by a checkpoint around it, is the same call.
    """
    own = block._pgf_theirs
    (own.forward if call.inverse else own.inverse)(block, call.x)


def _unfit(block: Any) -> str:
    if reason := unfit(block):
        return reason
    affine = parts(block)[2].flows[1]
    if affine.scale and affine.scale_map not in ("exp", "tanh", "sigmoid"):
        return f"scale map {affine.scale_map!r}: no kernel has it"
    cap = affine.s_cap
    return "" if cap is None or 0 < cap <= MAX_CLAMP else f"s_cap {cap}: expected a number above 0, at most {MAX_CLAMP}"


def _coupling(block: Any) -> NetCoupling:
    affine = parts(block)[2].flows[1]
    s_cap, t_cap = affine.s_cap or 0.0, affine.t_cap or 0.0
    if not affine.scale:
        return coupling_of(block, *ADDITIVE)
    if affine.scale_map == "sigmoid":
        return coupling_of(block, CouplingSpec(), Outputs(True, (-1.0, 1.0), (t_cap, s_cap)))
    spec = CouplingSpec(scale_map="tanh", clamp=float(s_cap)) if s_cap else CouplingSpec(scale_map="exp")
    return coupling_of(block, spec, Outputs(True, (-1.0, -1.0), (t_cap, 0.0)))


def _weight(conv: Any) -> tuple[Tensor, Tensor]:
    """W (C, C) and log|det W|."""
    if not conv.use_lu:
        return conv.W, functional.log_abs_det(conv.W)
    log_diagonal, above, channels = _bounded(conv.log_S, conv.s_cap), conv.U.triu(1), conv.num_channels
    most = conv.u_offdiag_cap * math.sqrt(channels * (channels - 1) / 2.0)
    above = above * torch.clamp(most / (torch.linalg.vector_norm(above) + 1e-6), max=1.0)
    upper = above + torch.diag(conv.sign_S * log_diagonal.exp())
    return full_product(full_product(conv.P, conv.L.tril(-1) + conv.eye), upper), log_diagonal.sum()


def _elements(block: Any, inverse: bool) -> list[Element]:
    actnorm, conv, _ = block.flows
    with full_precision(actnorm.s):
        weight, log_det = _weight(conv)
        log_scale, shift = _log_scale(actnorm), actnorm.t.flatten()  # z = diag(exp(-B)) (W y - t')
        scale, log_det = (-log_scale).exp(), log_det - log_scale.sum()
        own = mapped(ChannelMap(weight * scale.unsqueeze(1), -shift * scale, log_det), inverse)
    return [_coupling(block), own]


@torch.no_grad()
def _limit(block: Any) -> Tensor:
    """States below it are within +-gen_clamp between convolution and actnorm too, w = z exp(B) + t'."""
    actnorm = block.flows[0]
    return (block._gen_clamp - actnorm.t.abs().amax()) / _log_scale(actnorm).abs().amax().exp()


BLOCK = Row(
    "GlowBlock of antsnormflows",
    by_class(*(f"{_FLOWS}.affine.glow.GlowBlock{dims}d" for dims in (2, 3))),
    CALLS,
    _elements,
    example,
    _unfit,
    inside=inside,
    waits=lambda block: not all(map(has_seen, actnorms(block))),
    prepare=_prepare,
    limit=_limit,
)

LIBRARY = Library(
    "antsnormflows",
    (BLOCK,),
    homes=(_FLOWS,),
    containers=("Composite", "Reverse"),
    from_latents=True,
    # Their checkpointing would run a joined run twice, which needs none: it recomputes by itself.
    while_joined=lambda owner: {name: False for name in ("_grad_checkpoint_override",) if hasattr(owner, name)},
)
