"""The generic path: the autograd node of a run of any invertible steps, in Python over the registered ops.

The forward runs without a record. What it keeps of a part are its input, its output and the states at its anchors, or
in mode "checkpoint" those of all steps, and of every other state its projection on random signs (see drift.py). The
backward recomputes the states step by step and holds each against its projection. A part that has drifted is redone
from its anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._derivatives import Saved, apply, differentiable_once
from pyglow_fast._tracing import call_untraced
from pyglow_fast.nets.run import GradientSum
from pyglow_fast.runs.deferred import accepted
from pyglow_fast.runs.drift import DriftControl, anchor_drift, lowest_of, project, projected_drift
from pyglow_fast.runs.parts import Part, Whole, part_limit
from pyglow_fast.runs.run import Fold, Maps, no_maps
from pyglow_fast.runs.steps import ChannelMap, Given, Step


def run_steps(
    steps: Sequence[Step],
    control: DriftControl | None,
    x: Tensor,
    cond: Tensor | None = None,
    maps: Maps | None = None,
) -> tuple[Tensor, Tensor]:
    """Map x to z and log_det (N,) through steps that the backward runs again.

    torch.compile does not trace it. Each part is a node of its own, see parts.py.

    Args:
        steps: at least one.
        control: of the drift; None: all states are kept.
        x, cond: of the steps.
        maps: the channel maps before the steps; None: there are none.
    """
    if torch.compiler.is_compiling():
        return call_untraced(run_steps, steps, control, x, cond, maps)
    step_bytes = [sum(tensor.nbytes for tensor in step.params) for step in steps]
    limit, maps = part_limit(x, step_bytes, x.nbytes), maps or no_maps(len(steps))
    units = maps.bounds(step_bytes, limit, limit or 0)
    whole = Whole(control, list(pairwise([0, *(maps.ends[end - 1] for _, end in units)])), knows_starts=True)
    log_dets = []
    for unit, part in zip(units, whole.parts, strict=True):
        own = steps[part.first : part.end]
        raw, fold = maps.of(*unit)
        tensors = [*(tensor for step in own for tensor in step.params), *raw]
        whole.joins(part.first, x, (cond, *tensors))
        x, log_det = apply(_RunSteps, own, part, fold, x, cond, *tensors)
        log_dets.append(log_det)
    return x, functional.summed(log_dets)


def _given(
    steps: Sequence[Step], fold: Fold, cond: Tensor | None, needs_cond: bool, tensors: Sequence[Tensor]
) -> tuple[list[Given], Sequence[Tensor]]:
    """What each step runs with, out of the flat list of parameters and, at its end, what the maps are folded from.

    Second, these raw tensors.
    """
    found, at = [], 0
    for step in steps:
        found.append(Given(cond, needs_cond, tensors[at : at + len(step.params)], None))
        at += len(step.params)
    raw = tensors[at:]
    folded = [part.unbind() for part in fold(raw)]
    if folded:
        found = [own._replace(map=ChannelMap(*parts)) for own, *parts in zip(found, *folded, strict=True)]
    return found, raw


class _RunSteps(torch.autograd.Function):
    """z, log_det of a part."""

    @staticmethod
    def forward(
        ctx: Any, steps: Sequence[Step], part: Part, fold: Fold, x: Tensor, cond: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z, log_det (N,)."""
        keeps_states = part.whole.keeps_states
        keep = set(range(len(steps)) if keeps_states else [0, *part.anchors])
        states: dict[int, Tensor] = {}
        seen: dict[int, Tensor] = {}
        memos, log_dets, z, lowest = [], [], x, x.dtype
        for k, (step, given) in enumerate(zip(steps, _given(steps, fold, cond, False, tensors)[0], strict=True)):
            if k in keep:
                states[k] = z
            else:
                seen[k] = project(z)
            z, log_det, memo, own_lowest = step.forward(z, given)
            lowest = lowest_of(lowest, own_lowest)
            memos.append(memo)
            log_dets.append(log_det)
        z = z.clone() if z is x else z  # which a step may hand on; an output of a function must be its own
        ctx.steps, ctx.part, ctx.fold, ctx.memos, ctx.lowest = steps, part, fold, memos, lowest
        ctx.states, ctx.seen = list(states), list(seen)
        # The output is the input of the part behind, and takes no memory of its own.
        ctx.save_for_backward(None if keeps_states else z, cond, *states.values(), *seen.values(), *tensors)
        return z, functional.summed(log_dets)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond and the parameters."""
        own, part, drifted = _Backward(ctx, saved, grad_log_det), ctx.part, None
        whole: Whole = part.whole
        if whole.control is None or whole.keeps_states:
            whole.checkpointed(part, grad_z.device)
            grad_x = own.differentiated(0, len(ctx.steps), grad_z)
        else:
            limit = whole.control.limit(grad_z.dtype, ctx.lowest)
            grad_x, worst = own.inverted(grad_z)
            if whole.defers(grad_z):
                drifted = whole.judged(part, worst, limit, 0)
            else:
                drift, redone = float(worst), 0
                if not drift <= limit:
                    grad_x, redone = own.redone(grad_z), len(ctx.steps)
                whole.judged(part, drift, limit, redone)
        of_params = [grad for grads in own.of_params for grad in grads]
        grads = (grad_x, own.of_cond.result(), *of_params, *own.of_raw())
        return (None, None, None, *accepted(grads, drifted))


class _Backward:
    """The backward of a part. A step that is redone overwrites the gradients of its parameters.

    Args:
        ctx, saved: of the part's node.
        grad_log_det: (N,).

    Attributes:
        of_params: the gradients of the parameters, by step.
        of_cond: that of the condition, summed over the steps.
    """

    def __init__(self, ctx: Any, saved: Saved, grad_log_det: Tensor) -> None:
        self._z, cond, *rest = saved
        counts = len(ctx.states), len(ctx.states) + len(ctx.seen)
        self._states: dict[int, Tensor] = dict(zip(ctx.states, rest[: counts[0]], strict=True))
        self._seen: dict[int, Tensor] = dict(zip(ctx.seen, rest[counts[0] : counts[1]], strict=True))
        self._steps: Sequence[Step] = ctx.steps
        given, self._raw = _given(self._steps, ctx.fold, cond, ctx.needs_input_grad[4], rest[counts[1] :])
        self._given = [own._replace(memo=memo) for own, memo in zip(given, ctx.memos, strict=True)]
        self._fold, self._grad_log_det = ctx.fold, grad_log_det
        self.of_params: list[Sequence[Tensor | None]] = [()] * len(self._steps)
        self._of_maps: list[tuple[Tensor, ...]] = [()] * len(self._steps)
        self.of_cond = GradientSum()

    def inverted(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of the input with recomputed states, and their worst drift, a scalar tensor."""
        z, drifts = self._z, []
        for k in reversed(range(len(self._steps))):
            true = self._states.get(k)
            found, grad = self._step(k, z, true, grad)
            drifts.append(projected_drift(found, self._seen[k]) if true is None else anchor_drift(found, true))
            z = found if true is None else true
        return grad, torch.stack(drifts).amax()

    def redone(self, grad: Tensor) -> Tensor:
        """Compute the gradient of the input again, with states that are computed forward from the anchors."""
        self.of_cond = GradientSum()
        for first, end in list(pairwise([*sorted(self._states), len(self._steps)]))[::-1]:
            for k in range(first, end - 1):
                self._states[k + 1] = self._steps[k].repeat(self._states[k], self._given[k])
            grad = self.differentiated(first, end, grad)
            for k in range(first + 1, end):
                del self._states[k]
        return grad

    def differentiated(self, first: int, end: int, grad: Tensor) -> Tensor:
        """Compute the gradient of the input of steps first .. end - 1, whose inputs are all known."""
        for k in reversed(range(first, end)):
            _, grad = self._step(k, None, self._states[k], grad)
        return grad

    def _step(self, k: int, y: Tensor | None, x: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The input of a step, and its gradient; those of the parameters and of the condition are noted."""
        found = self._steps[k].backward(y, x, grad, self._grad_log_det, self._given[k])
        x, grad, of_cond, self.of_params[k], self._of_maps[k] = found
        self.of_cond.add(of_cond)
        return x, grad

    def of_raw(self) -> Sequence[Tensor | None]:
        """Compute the gradients of what the maps are folded from."""
        if not any(tensor.requires_grad for tensor in self._raw):
            return [None] * len(self._raw)
        matrices, offsets, log_dets = (torch.stack(parts) for parts in zip(*self._of_maps, strict=True))
        found: Sequence[Tensor | None] = self._fold.gradients(self._raw, matrices, offsets, log_dets)
        return found
