"""Runs of flow steps as autograd functions: states recomputed by inversion, or kept and nets recomputed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._derivatives import apply, differentiable_once
from pyglow_fast.coupling_nets.masks import mask_of, positions_of
from pyglow_fast.coupling_nets.net_runner import Memo, NetRunner
from pyglow_fast.coupling_nets.precision import in_precision
from pyglow_fast.reference import CouplingSpec, n_positions
from pyglow_fast.reversible.backward import ChainBackward
from pyglow_fast.reversible.drift import lowest_precision, project, sketch
from pyglow_fast.reversible.maps import FoldedMaps, MapGroup, MapsOfPart, OpenGroup
from pyglow_fast.reversible.parts import Part, Pass
from pyglow_fast.reversible.trail import KnownStates, Trail, Trails


@dataclass(frozen=True)
class Chain:
    """K flow steps of one width that are a part of a run: all but its tensors.

    Attributes:
        nets: of each step.
        specs: the coupling of each step.
        squeeze_first: the input is squeezed as it is read.
        part: of the pass that this is: which states are kept, and who is told of their drift.
        run: what all parts share.
        group: that the channel maps are of.
        masked: the first channel of cond is a mask (see coupling_nets/masks.py): where it is zero the states are kept
            zero, which the input and what the nets give are.
    """

    nets: Sequence[NetRunner]
    specs: Sequence[CouplingSpec]
    squeeze_first: bool
    part: Part
    run: Run
    group: MapGroup
    masked: bool = False

    def __len__(self) -> int:
        return len(self.nets)

    @property
    def opens(self) -> bool:
        """Whether a backward meets the group here for the first time."""
        return self.part.end == self.group.end

    @property
    def closes(self) -> bool:
        """Whether a backward has met all of the group's steps behind this part: it gives the maps' gradients."""
        return self.part.first == self.group.first

    def maps(self, of: FoldedMaps | OpenGroup) -> MapsOfPart:
        """The channel maps of the part's steps, out of those of its group."""
        return of.of_part(slice(self.part.first - self.group.first, self.part.end - self.group.first))

    def masked_state(self, u: Tensor, cond: Tensor | None) -> Tensor:
        """Set u to zero at masked positions, where a channel map has put its offset."""
        return u.mul_(mask_of(cond)) if self.masked and cond is not None else u

    def positions(self, z: Tensor, cond: Tensor | None) -> Tensor | int:
        """Count the positions: with a mask of each sample its own, (N,)."""
        return positions_of(cond) if self.masked and cond is not None else n_positions(z)

    @property
    def params(self) -> list[nn.Parameter]:
        """List the parameters of all nets, one net after another."""
        return [parameter for net in self.nets for parameter in net.params]

    def params_of(self, params: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Cut the flat list of parameters by step."""
        parts, at = [], 0
        for net in self.nets:
            parts.append(params[at : at + len(net.names)])
            at += len(net.names)
        return parts


class Run:
    """State that the parts of one forward share: where each is, and where a backward has come to."""

    def __init__(self) -> None:
        self.trails = Trails()
        self.nodes: dict[int, weakref.ref[Any]] = {}  # the functions of the parts, by index, as long as the graph lives

    def node(self, index: int) -> Any:
        """The autograd function of a part, as long as the graph lives."""
        return self.nodes[index]()


@dataclass(frozen=True)
class Kept:
    """Tensors that a forward pass keeps besides its input and output: states by step, and what repeats the nets."""

    anchors: dict[int, Tensor]  # inputs of steps but the first; none if checkpointing
    states: list[Tensor]  # u of every step; none unless checkpointing
    seen: Tensor | None  # projections of every step's u, (K, N, C); none if checkpointing
    sketch: Tensor | None  # of the first step's u, where its input is not kept
    memos: list[Memo]
    lowest: torch.dtype  # that the nets compute in


def forward_pass(
    chain: Chain, x: Tensor, cond: Tensor | None, maps: MapsOfPart, params: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Kept]:
    """Compute z, the couplings' log_det (N,), and what is kept, in one pass between two nets; two at an anchor."""
    keeps_states, anchor_steps = chain.part.whole.keeps_states, set(chain.part.anchors)
    anchors, states, memos = {}, [], []
    seen: list[Tensor] = []
    lowest = x.dtype
    steps = list(zip(maps.matrices, maps.offsets, maps.indices, strict=True))
    matrix, offset, index = steps[0]
    u = chain.masked_state(functional.channel_mix(x, matrix, offset, chain.squeeze_first, index), cond)
    log_det = u.new_zeros(u.shape[0])
    first = None if chain.part.knows_start else sketch(u)
    for k, (net, spec, following) in enumerate(zip(chain.nets, chain.specs, [*steps[1:], None], strict=True)):
        if keeps_states:
            states.append(u)
        else:
            seen.append(project(u))
        net_out, memo = net.forward(u[:, : net.reads(u.shape[1])], cond, params[k])
        memos.append(memo)
        with in_precision(net.precision, u):  # its precision does not show in an output in float32
            lowest = lowest_precision(lowest, net_out, params[k])
        if following is None:
            u, step_log_det = functional.coupling(u, net_out, spec)
        elif k + 1 in anchor_steps:
            matrix, offset, index = following
            y, step_log_det = functional.coupling(u, net_out, spec)
            anchors[k + 1] = y
            u = functional.channel_mix(y, matrix, offset, index=index)
        else:
            matrix, offset, index = following
            u, step_log_det = functional.coupling_mix(u, net_out, matrix, offset, spec, index)
        u = chain.masked_state(u, cond)
        log_det += step_log_det
    return u, log_det, Kept(anchors, states, torch.stack(seen) if seen else None, first, memos, lowest)


class _Saved(NamedTuple):
    """The tensors that the function of a part has saved: five, each of which may be missing, then sequences."""

    x: Tensor | None
    z: Tensor | None
    cond: Tensor | None
    sketch: Tensor | None
    seen: Tensor | None
    params: Sequence[Tensor]
    raw: Sequence[Tensor]
    anchors: Sequence[Tensor]
    states: Sequence[Tensor]

    def save(self, ctx: Any) -> None:
        """With the function, which frees them as soon as its backward is done."""
        ctx.counts = [len(part) for part in self[5:]]
        ctx.save_for_backward(*self[:5], *(tensor for part in self[5:] for tensor in part))

    @classmethod
    def of(cls, ctx: Any) -> _Saved:
        """What :meth:`save` was given."""
        tensors = list(ctx.saved_tensors)
        own, rest = tensors[:5], iter(tensors[5:])
        return cls(*own, *([next(rest) for _ in range(count)] for count in ctx.counts))


def _walk_of(ctx: Any, saved: _Saved, maps: MapsOfPart, *gradients: Any) -> ChainBackward:
    """The walk back through a part; without what ChainBackward needs for gradients it recomputes states alone."""
    chain: Chain = ctx.chain
    anchors = dict(zip(ctx.anchor_steps, saved.anchors, strict=True))
    kept = Kept(anchors, list(saved.states), saved.seen, saved.sketch, ctx.memos, ctx.lowest)
    params = chain.params_of(saved.params)
    return ChainBackward(chain, saved.x, saved.cond, maps, params, kept, ctx.needs_input_grad[4], *gradients)


def _restored(chain: Chain, trail: Trail) -> tuple[Tensor, int]:
    """The true input of a part, forward from the anchor before it, and how many steps that took.

    The states on the way are known from then on, so that these steps need not be inverted.
    """
    part, run = chain.part, chain.run
    parts = part.whole.parts
    index = next(i for i in reversed(range(part.index)) if parts[i].anchors or parts[i].knows_start)
    first, count = max(parts[index].anchors, default=0), 0
    x: Tensor | None = None
    assert trail.maps is not None  # of this part
    group, folded = chain.group, trail.maps.maps
    for own in parts[index : part.index]:
        ctx = run.node(own.index)
        saved = _Saved.of(ctx)
        if ctx.chain.group is not group:
            group = ctx.chain.group
            # The maps of this part's own group are those that are open; the part that opened them may be freed by now.
            if group is chain.group:
                folded = trail.maps.maps
            else:
                opener = next(other for other in parts if other.end == group.end)
                folded = FoldedMaps.of(group, _Saved.of(run.node(opener.index)).raw)
        walk = _walk_of(ctx, saved, ctx.chain.maps(folded))
        start = walk.anchors.get(first, saved.x) if x is None else x
        assert start is not None  # known of the first part, computed of those behind it
        states = walk.states(first, len(ctx.chain) - 1, start)
        trail.known[own.index] = KnownStates(first, start, states)
        x, count, first = walk.output(states[-1]), count + len(states), 0
    assert x is not None  # there is a part before one whose input is not known
    return x, count


class _RunPart(torch.autograd.Function):
    """z, log_det of a part; what its backward needs is saved, or comes from the part behind it."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        maps: FoldedMaps,
        raw: Sequence[Tensor],
        x: Tensor,
        cond: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """z like x (squeezed), log_det (N,). inputs: the nets' parameters and, of the part that closes, raw."""
        params = inputs[: len(chain.params)]
        z, log_det, kept = forward_pass(chain, x, cond, chain.maps(maps), chain.params_of(params))
        ctx.chain, ctx.memos, ctx.lowest, ctx.anchor_steps = chain, kept.memos, kept.lowest, list(kept.anchors)
        part = chain.part
        _Saved(
            x if part.knows_start else None,
            z if part.is_last and not kept.states else None,
            cond,
            kept.sketch,
            kept.seen,
            params,
            raw if chain.opens else [],
            list(kept.anchors.values()),
            kept.states,
        ).save(ctx)
        chain.run.nodes[part.index] = weakref.ref(ctx)
        if chain.closes:
            log_det = log_det + maps.log_dets.sum() * chain.positions(z, cond)
        return z, log_det

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond, the nets' parameters and, of the part that closes, what the maps are made of."""
        chain: Chain = ctx.chain
        saved, trail = _Saved.of(ctx), chain.run.trails.of(chain.part)
        if chain.opens:
            trail.maps = OpenGroup(chain.group, saved.raw)
        assert trail.maps is not None  # the part that opens is behind this one
        walk = _walk_of(ctx, saved, chain.maps(trail.maps), grad_log_det, partial(_restored, chain, trail))
        known = trail.known.pop(chain.part.index, None)
        if known is not None:
            grad_x = walk.continued(known, grad_z)
        else:
            y = saved.z if chain.part.is_last else trail.y
            grad_x = walk.run(grad_z if y is None else y, grad_z)
        trail.y = walk.start
        of_maps: list[Tensor | None] = []
        if chain.closes:
            of_maps = trail.maps.gradients((grad_log_det * chain.positions(grad_z, saved.cond)).sum())
            trail.maps = None
        of_nets = [grad for step in walk.grad_params for grad in step]
        grads = (grad_x, walk.cond_sum.result(), *of_nets, *of_maps)
        return (None, None, None, *map(walk.accepted, grads))


def run_chain(
    nets: Sequence[NetRunner],
    specs: Sequence[CouplingSpec],
    groups: Sequence[MapGroup],
    whole: Pass,
    x: Tensor,
    cond: Tensor | None = None,
    squeeze_first: bool = False,
    masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute z and log|det dz/dx| of K steps: u = M x + c, then the coupling of u, K times.

    torch.compile must not trace it. Memory that lives until the backward: x, z, and per step an (N, C) projection, plus
    the anchors that the pass asks for, and a sketch of each part's first state; or the state of every step if it wants
    all. Nothing of the nets is kept, and nothing of the maps.

    Args:
        nets, specs: of the steps.
        groups: of the channel maps M, c. What is not passed on of a drifted run's gradients must not be passed on
            around it either: so their log|det M| is counted here.
        whole: the pass, cut where the groups end.
        x: (N, C, *spatial); with squeeze_first (N, C / 2^d, *(2 spatial)).
        cond: what the nets get besides, or None.
        squeeze_first: x is squeezed as it is read.
        masked: see Chain.

    Returns:
        z (N, C, *spatial) and log_det (N,), nats.
    """
    run, log_dets = Run(), []
    for group in groups:
        maps, known = FoldedMaps.of(group, group.raw), dataclasses.replace(group, raw=())
        for part in (part for part in whole.parts if group.first <= part.first < group.end):
            own = slice(part.first, part.end)
            chain = Chain(nets[own], specs[own], squeeze_first and part.first == 0, part, run, known, masked)
            others = (cond, *chain.params, *(group.raw if chain.closes else ()))
            whole.joins(part.first, x, others)
            x, log_det = apply(_RunPart, chain, maps, group.raw, x, *others)
            log_dets.append(log_det)
    return x, functional.summed(log_dets)
