"""One autograd function for a run of flow steps: states recomputed by inversion, or kept and nets recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._derivatives import apply, differentiable_once
from pyglow_fast.coupling_nets.net_runner import Memo, NetRunner
from pyglow_fast.coupling_nets.precision import in_precision
from pyglow_fast.reference import CouplingSpec, n_positions
from pyglow_fast.reversible.backward import ChainBackward, unbind_indices
from pyglow_fast.reversible.drift import Witness, lowest_precision
from pyglow_fast.reversible.limits import call_untraced, refuse_transforms
from pyglow_fast.reversible.parts import Part


@dataclass(frozen=True)
class Chain:
    """A run of K flow steps of one width, apart from its tensors.

    Attributes:
        nets: of each step.
        specs: the coupling of each step.
        kept: channels that feed the net.
        squeeze_first: the input is squeezed as it is read.
        part: of the pass that this is: which states are kept, and who is told of their drift.
    """

    nets: Sequence[NetRunner]
    specs: Sequence[CouplingSpec]
    kept: int
    squeeze_first: bool
    part: Part

    def __len__(self) -> int:
        return len(self.nets)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters of all nets, one after another."""
        return [parameter for net in self.nets for parameter in net.params]

    def params_of(self, params: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """The flat list of parameters, by step."""
        parts, at = [], 0
        for net in self.nets:
            parts.append(params[at : at + len(net.names)])
            at += len(net.names)
        return parts


@dataclass(frozen=True)
class Kept:
    """What a forward pass keeps besides its input and output: states by step, and what repeats the nets' runs."""

    anchors: dict[int, Tensor]  # inputs of steps; none if checkpointing
    states: list[Tensor]  # u of every step; none unless checkpointing
    seen: list[Tensor]  # by Witness.of u, two tensors a step; none if checkpointing
    memos: list[Memo]
    lowest: torch.dtype  # that the nets compute in


def forward_pass(
    chain: Chain,
    x: Tensor,
    cond: Tensor | None,
    matrices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    indices: Sequence[Tensor | None],
    params: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, Tensor, Kept]:
    """z, the couplings' log_det (N,), and what is kept. Between nets there is one pass; two where an anchor lies."""
    keeps_states, anchor_steps = chain.part.whole.keeps_states, set(chain.part.anchors)
    anchors, states, memos = {}, [], []
    seen: list[Tensor] = []
    lowest = x.dtype
    maps = list(zip(matrices, offsets, indices, strict=True))
    matrix, offset, index = maps[0]
    u = functional.channel_mix(x, matrix, offset, chain.squeeze_first, index)
    log_det = u.new_zeros(u.shape[0])
    for k, (net, spec, following) in enumerate(zip(chain.nets, chain.specs, [*maps[1:], None], strict=True)):
        if keeps_states:
            states.append(u)
        else:
            seen += Witness.of(u)
        net_out, memo = net.forward(u[:, : chain.kept], cond, params[k])
        memos.append(memo)
        with in_precision(net.precision, u):  # which does not show in an output in float32
            lowest = lowest_precision(lowest, net_out)
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
        log_det += step_log_det
    return u, log_det, Kept(anchors, states, seen, memos, lowest)


class _Run(torch.autograd.Function):
    """z, log_det of a chain; everything that its backward needs is an input, an output or in ``Kept``."""

    @staticmethod
    def forward(
        ctx: Any,
        chain: Chain,
        x: Tensor,
        cond: Tensor | None,
        matrices: Tensor,
        offsets: Tensor,
        map_log_det: Tensor,
        indices: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """z like x (squeezed), log_det (N,)."""
        by_step = chain.params_of(params)
        by_map = matrices.unbind(), offsets.unbind(), unbind_indices(indices, len(chain))
        z, log_det, kept = forward_pass(chain, x, cond, *by_map, by_step)
        ctx.chain, ctx.memos, ctx.has_cond = chain, kept.memos, cond is not None
        ctx.lowest = kept.lowest
        ctx.anchor_steps, ctx.n_seen = list(kept.anchors), len(kept.seen)
        conditions = [] if cond is None else [cond]
        inner = [*kept.anchors.values(), *kept.seen, *kept.states]
        ctx.save_for_backward(x, z, matrices, offsets, indices, *conditions, *params, *inner)
        return z, log_det + functional.per_sample(z, map_log_det)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond, M, c, log|det M| and the nets' parameters."""
        chain: Chain = ctx.chain
        x, z, matrices, offsets, indices, *rest = ctx.saved_tensors
        cond = rest.pop(0) if ctx.has_cond else None
        n_params, n_anchors = len(chain.params), len(ctx.anchor_steps)
        params, inner = rest[:n_params], rest[n_params:]
        anchors = dict(zip(ctx.anchor_steps, inner[:n_anchors], strict=True))
        seen = inner[n_anchors : n_anchors + ctx.n_seen]
        states = inner[n_anchors + len(seen) :]
        kept = Kept(anchors, states, seen, ctx.memos, ctx.lowest)
        by_step = chain.params_of(params)
        backward = ChainBackward(
            chain, x, cond, matrices, offsets, indices, by_step, kept, grad_log_det, ctx.needs_input_grad[2]
        )
        grad_x = backward.run(z, grad_z)
        grads = (
            grad_x,
            backward.cond_sum.result(),
            torch.stack(backward.grad_matrices),
            torch.stack(backward.grad_offsets),
            grad_log_det.sum() * n_positions(z),
            None,
            *[grad for step in backward.grad_params for grad in step],
        )
        return (None, *(grads if backward.drifted is None else map(backward.accepted, grads)))


def run_chain(
    chain: Chain,
    x: Tensor,
    cond: Tensor | None,
    matrices: Tensor,
    offsets: Tensor,
    map_log_det: Tensor,
    indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z and log|det dz/dx| of K steps: u = M x + c, then the coupling of u, K times.

    Memory that lives until the backward: x, z, and per step an (N, C) projection and norm, plus the anchors that the
    pass asks for, or the state of every step if it wants all. Nothing of the nets.

    Args:
        chain: the steps.
        x: (N, C, *spatial); with chain.squeeze_first (N, C / 2^d, *(2 spatial)).
        cond: what the nets get besides, or None.
        matrices, offsets: (K, C, C) and (K, C); with indices, the scales (K, C) of gathers and (K, C).
        map_log_det: sum of log|det M| over the steps, a scalar tensor. It comes in here, since what is not passed on of
            a drifted run's gradients must not be passed on around it either.
        indices: (K, C) int64, where the maps are gathers: see :func:`pyglow_fast.reference.channel_mix`.

    Returns:
        z (N, C, *spatial) and log_det (N,), nats.
    """
    refuse_transforms()
    inputs = (x, cond, matrices, offsets, map_log_det, indices, *chain.params)
    chain.part.whole.joins(chain.part.first, inputs)
    return call_untraced(_run, chain, *inputs)


def _run(*inputs: Any) -> tuple[Tensor, Tensor]:
    return apply(_Run, *inputs)
