"""Blocks of antsnormflows (ANTsX), as ANTsTorch's create_glow_normalizing_flow_model_2d and _3d put them together.

GlowBlock2d / GlowBlock3d, from data to latents (``inverse``): y1 = u1, y2 = (u2 - T(t)) exp(-S(s)) with (t, s) the even
and odd channels of net(u1); w = W y; z = (w - t') exp(-B(s')). S, B and the logarithms in W = P L U are bounded:
cap tanh(. / cap), and T where the block has a shift_cap; U above its diagonal is scaled to a root mean square of at
most u_offdiag_cap. Behind each of the three nan_to_num and a clamp of +-gen_clamp follow: see limits.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.coupling_nets.chain import Outputs
from pyglow_fast.interop.known_net import LOG_MAPS, WRAPPERS, Affine, qualified
from pyglow_fast.interop.limits import watched
from pyglow_fast.interop.table import Call, Couples, Library, Part, Row, UnfitError, by_class, read_once
from pyglow_fast.interop.uniform import UniformRun
from pyglow_fast.layers.coupling import MAX_CLAMP
from pyglow_fast.layers.flow_step import unstack_maps
from pyglow_fast.reference import CouplingSpec, full_precision, full_product
from pyglow_fast.reversible.steps import ChannelMap

__all__ = ["LIBRARY"]

_FLOWS = "antsnormflows.flows"
_ACTNORM, _COUPLING = f"{_FLOWS}.normalization.ActNorm", f"{_FLOWS}.affine.coupling.AffineCouplingBlock"
_CONVOLUTIONS = tuple(f"{_FLOWS}.mixing.{name}" for name in ("Invertible1x1Conv", "Invertible1x1x1Conv"))
_SPLITS = tuple(f"{_FLOWS}.reshape.{name}" for name in ("Split", "Merge"))
_AFFINE = f"{_FLOWS}.affine.coupling.AffineCoupling"


def _bounded(value: Tensor, cap: Any) -> Tensor:
    return value if cap is None else cap * torch.tanh(value / cap)


def _net_actnorm(norm: Any, dims: int) -> Affine | None:
    """Of an actnorm in a net, which is called forward: log_scale and shift; None while it waits for data."""
    own = norm.actNorm
    return (_bounded(own.s, own.log_s_cap).flatten(), own.t.flatten()) if _has_seen(own) else None


LOG_MAPS["antsnormflows.utils.nn.ActNorm"] = _net_actnorm
WRAPPERS |= {f"antsnormflows.nets.cnn.ConvNet{dims}d": "net" for dims in (2, 3)}


def _has_seen(norm: Any) -> bool:
    return bool(read_once(norm, "data_dep_init_done", norm.data_dep_init_done, lambda flag: bool(flag > 0)))


def _actnorms(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if qualified(type(module)) == _ACTNORM]


def _prepare(blocks: Sequence[Any], call: Call) -> None:
    """Let blocks, from data to latents, see what initialises their actnorms, in their own code.

    It is done before ours runs, so that a recomputation of the call is the same call.
    """
    if not all(_has_seen(norm) for block in blocks for norm in _actnorms(block)):
        state = call.x
        with torch.no_grad():
            for block in reversed(blocks) if call.inverse else blocks:
                own = block._pgf_theirs
                state, _ = (own.forward if call.inverse else own.inverse)(block, state)


def _unfit(block: Any) -> str:
    names = [qualified(type(layer)) for layer in block.flows]
    if len(names) != 3 or names[0] != _ACTNORM or names[1] not in _CONVOLUTIONS or names[2] != _COUPLING:
        return "other layers than an actnorm, a convolution and a coupling"
    actnorm, conv, coupling = block.flows
    split, affine, merge = coupling.flows
    if [qualified(type(layer)) for layer in coupling.flows] != [_SPLITS[0], _AFFINE, _SPLITS[1]]:
        return "a coupling of other layers than a split, a coupling and a merge"
    if (split.mode, merge.mode) != ("channel", "channel") or conv.num_channels % 2:
        return f"a split {split.mode!r} of {conv.num_channels} channels: expected halves of the channels"
    if actnorm.s.shape != (1, conv.num_channels, *[1] * (actnorm.s.dim() - 2)):
        return f"an actnorm of shape {tuple(actnorm.s.shape)}"
    if affine.scale and affine.scale_map not in ("exp", "tanh", "sigmoid"):
        return f"scale map {affine.scale_map!r}: no kernel has it"
    caps = {"s_cap": (affine.s_cap, MAX_CLAMP), "t_cap": (affine.t_cap, math.inf)}
    bad = [name for name, (cap, most) in caps.items() if cap is not None and not 0 < cap <= most]
    return f"{bad[0]} {getattr(affine, bad[0])}: expected a number above 0" if bad else ""


def _couples(block: Any) -> Couples:
    affine, half = block.flows[2].flows[1], block.flows[1].num_channels // 2
    s_cap, t_cap = affine.s_cap or 0.0, affine.t_cap or 0.0
    if not affine.scale:
        return Couples(affine.param_map, CouplingSpec("additive"), half, half, Outputs(False, (-1.0, -1.0)))
    if affine.scale_map == "sigmoid":
        return Couples(affine.param_map, CouplingSpec(), half, half, Outputs(True, (-1.0, 1.0), (t_cap, s_cap)))
    spec = CouplingSpec(scale_map="tanh", clamp=float(s_cap)) if s_cap else CouplingSpec(scale_map="exp")
    return Couples(affine.param_map, spec, half, half, Outputs(True, (-1.0, -1.0), (t_cap, 0.0)))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).unsqueeze(1)


def _maps(blocks: Sequence[Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], ChannelMap]]:
    """What the maps of blocks, z = diag(exp(-B)) (W y - t'), are made of, and what makes them, stacked."""
    norms, convs = [block.flows[0] for block in blocks], [block.flows[1] for block in blocks]
    if len({conv.use_lu for conv in convs}) != 1:
        raise UnfitError("convolutions with and without LU factors")
    names, like = ("log_S", "L", "U") if convs[0].use_lu else ("W",), norms[0].s
    raw = [getattr(norm, name) for name in ("s", "t") for norm in norms]
    raw += [getattr(conv, name) for name in names for conv in convs]
    norm_caps, caps = _column([norm.log_s_cap for norm in norms], like), _column([conv.s_cap for conv in convs], like)
    channels = convs[0].num_channels
    most = _column([conv.u_offdiag_cap * math.sqrt(channels * (channels - 1) / 2.0) for conv in convs], like)

    def fold(given: Sequence[Tensor]) -> ChannelMap:
        stacks = iter([torch.stack(list(given[i : i + len(blocks)])) for i in range(0, len(given), len(blocks))])
        with full_precision(given[0]):
            log_scale, shift = -_bounded(next(stacks).flatten(1), norm_caps), next(stacks).flatten(1)
            first = next(stacks)
            if not convs[0].use_lu:
                weight, log_det = first, functional.log_abs_det(first)
            else:
                log_diagonal, lower, above = _bounded(first, caps), next(stacks).tril(-1), next(stacks).triu(1)
                norm = torch.linalg.vector_norm(above, dim=(1, 2)).unsqueeze(1)
                above = above * torch.clamp(most / (norm + 1e-6), max=1.0).unsqueeze(2)
                upper = above + torch.diag_embed(torch.stack([conv.sign_S for conv in convs]) * log_diagonal.exp())
                lower = full_product(torch.stack([conv.P for conv in convs]), lower + convs[0].eye)
                weight, log_det = full_product(lower, upper), log_diagonal.sum(1)
            scale = log_scale.exp()
            return ChannelMap(weight * scale.unsqueeze(2), -shift * scale, log_det + log_scale.sum(1))

    return raw, fold


def _parts(block: Any, inverse: bool) -> list[Part]:
    raw, fold = _maps([block])
    (own,) = unstack_maps(fold(raw))
    if inverse:  # W^-1 (z exp(B) + t') is M^-1 z + W^-1 t'
        matrix = functional.invert_matrix(own.matrix)
        own = ChannelMap(matrix, -full_product(matrix, own.offset.unsqueeze(1)).squeeze(1), -own.log_det)
    return [_couples(block), own]


@torch.no_grad()
def _limit(blocks: Sequence[Any]) -> Tensor:
    """States below it are within +-gen_clamp between convolution and actnorm too, w = z exp(B) + t'."""
    norms = [block.flows[0] for block in blocks]
    caps = _column([norm.log_s_cap for norm in norms], norms[0].s)
    log_scale = _bounded(torch.stack([norm.s for norm in norms]).flatten(1), caps)
    shift = torch.stack([norm.t for norm in norms]).flatten(1).abs().amax(1)
    limits = shift.new_tensor([block._gen_clamp for block in blocks]) - shift
    return (limits / log_scale.abs().amax(1).exp()).amin()


def _called(inverse: bool) -> Callable[..., Call | None]:
    def read(block: Any, z: Tensor) -> Call | None:
        actnorm, conv, _ = block.flows
        fits = isinstance(z, Tensor) and z.dim() == actnorm.s.dim() and z.shape[1] == conv.num_channels
        return Call(z, inverse, lambda state, log_det: (state, log_det)) if fits else None

    return read


def _example(block: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    for norm in _actnorms(block):
        norm.data_dep_init_done.fill_(1.0)  # type: ignore[operator]
    actnorm, conv, _ = block.flows
    sizes = (2, conv.num_channels, *((3, 4) if actnorm.s.dim() == 4 else (2, 2, 3)))
    return [(method, (draw(*sizes),), {}) for method in ("inverse", "forward")]


BLOCK = Row(
    "GlowBlock of antsnormflows",
    by_class(*(f"{_FLOWS}.affine.glow.GlowBlock{dims}d" for dims in (2, 3))),
    {"forward": _called(inverse=True), "inverse": _called(inverse=False)},
    _parts,
    _example,
    _unfit,
    inside=lambda block: [*block.flows, *block.flows[-1].flows, *_actnorms(block)],
    prepare=_prepare,
    run=watched(_limit),
)

LIBRARY = Library(
    "antsnormflows",
    (BLOCK,),
    homes=(_FLOWS,),
    containers=("Composite", "Reverse"),
    from_latents=True,
    runs=partial(UniformRun, couples=_couples, maps=_maps, limit=_limit),
    # Their checkpointing would run a joined run twice, which needs none: it recomputes by itself.
    while_joined=lambda owner: {name: False for name in ("_grad_checkpoint_override",) if hasattr(owner, name)},
)
