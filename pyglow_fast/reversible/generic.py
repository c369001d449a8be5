"""The generic path: the autograd node of a run of any invertible steps, in Python over the registered ops.

The forward runs without a record. What it keeps of a run are the states at its anchors, or in mode "checkpoint" of all
steps, and of every other state its projection on random signs (see drift.py). The backward recomputes the states step
by step from the output, holds each against its projection, and redoes from its anchor what has drifted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._captures import is_capturing
from pyglow_fast._derivatives import apply, differentiable_once
from pyglow_fast._errors import can_read
from pyglow_fast.coupling_nets.run import GradientSum
from pyglow_fast.reference import n_positions
from pyglow_fast.reversible.deferred import accepted, drifted_in_this_backward
from pyglow_fast.reversible.drift import DriftControl, anchor_drift, lowest_of, project, projected_drift, sketch
from pyglow_fast.reversible.limits import call_untraced
from pyglow_fast.reversible.parts import Part, Whole, kept_between, part_limit
from pyglow_fast.reversible.run import FOLDED_AT_ONCE, Fold, Maps, no_maps
from pyglow_fast.reversible.steps import Given, Map, Step


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
    return call_untraced(_run_steps, steps, control, x, cond, maps)


def _run_steps(
    steps: Sequence[Step], control: DriftControl | None, x: Tensor, cond: Tensor | None, maps: Maps | None
) -> tuple[Tensor, Tensor]:
    step_bytes = [sum(tensor.nbytes for tensor in step.params) for step in steps]
    boundary, few = kept_between(x.nbytes, n_positions(x), control is None)
    maps = maps or no_maps(len(steps))
    units = maps.bounds(step_bytes, part_limit(x, step_bytes, boundary), FOLDED_AT_ONCE)
    whole = Whole(control, list(pairwise([0, *(maps.ends[end - 1] for _, end in units)])), few)
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
        found = [own._replace(map=Map(*parts)) for own, *parts in zip(found, *folded, strict=True)]
    return found, raw


class _RunSteps(torch.autograd.Function):
    """z, log_det of a part."""

    @staticmethod
    def forward(
        ctx: Any, steps: Sequence[Step], part: Part, fold: Fold, x: Tensor, cond: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z, log_det (N,)."""
        keeps_states = part.whole.keeps_states
        keep = set(range(len(steps)) if keeps_states else part.anchors)
        if part.knows_start:
            keep.add(0)
        states: dict[int, Tensor] = {}
        seen: dict[int, Tensor] = {}
        memos, log_dets, z, lowest = [], [], x, x.dtype
        for k, (step, given) in enumerate(zip(steps, _given(steps, fold, cond, False, tensors)[0], strict=True)):
            if k in keep:
                states[k] = z
            else:
                seen[k] = project(z) if k else sketch(z)
            z, log_det, memo, own_lowest = step.forward(z, given)
            lowest = lowest_of(lowest, own_lowest)
            memos.append(memo)
            log_dets.append(log_det)
        z = z.clone() if z is x else z  # which a step may hand on; an output of a function must be its own
        ctx.steps, ctx.part, ctx.fold, ctx.memos, ctx.lowest = steps, part, fold, memos, lowest
        ctx.states, ctx.seen = list(states), list(seen)
        keeps_z = part.is_last and not keeps_states
        ctx.save_for_backward(z if keeps_z else None, cond, *states.values(), *seen.values(), *tensors)
        part.whole.nodes[part.index] = weakref.ref(ctx)
        return z, functional.summed(log_dets)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond and the parameters."""
        own, part = _Backward(ctx, grad_log_det), ctx.part
        whole, drifted = part.whole, None
        if whole.keeps_states:
            whole.checkpointed(part.first, grad_z.device)
            grad_x = own.differentiated(0, len(ctx.steps), grad_z)
        else:
            left = whole.take(part)
            z = own.z if left is None else left
            limit = whole.control.limit(grad_z.dtype, ctx.lowest)
            if whole.control.deferred or is_capturing(grad_z.device):
                grad_x, worst = own.inverted(z, grad_z, None)
                drifted = drifted_in_this_backward(~(worst <= limit))
                whole.deferred(part.first, worst, limit, drifted)
            else:
                grad_x, _ = own.inverted(z, grad_z, limit)
                whole.judged(part.first, own.worst, limit, own.redone)
            whole.leave(part, own.start)
        of_params = [grad for grads in own.of_params for grad in grads]
        grads = (grad_x, own.of_cond.result(), *of_params, *own.of_raw())
        return (None, None, None, *[accepted(grad, drifted) for grad in grads])


def _restored(whole: Whole, index: int) -> tuple[Tensor, int]:
    """The true input of a part, forward from the anchor before it, and how many steps that took."""
    ctxs: list[Any] = [whole.nodes[i]() for i in range(index)]
    begin = next(i for i in reversed(range(index)) if ctxs[i].states)
    state: Tensor | None = None
    count = 0
    for ctx in ctxs[begin:]:
        own = _Backward(ctx)
        first = 0 if state is not None else ctx.states[-1]
        state = own.states[first] if state is None else state
        for k in range(first, len(ctx.steps)):
            state = ctx.steps[k].repeat(state, own.given[k])
            count += 1
    assert state is not None
    return state, count


class _Backward:
    """The backward of a part. A step that is redone overwrites the gradients of its parameters.

    Args:
        ctx: of the part's node.
        grad_log_det: (N,); None where nothing is differentiated.

    Attributes:
        z: the output of the last part; None of the others.
        states: inputs of steps that are kept, by number.
        start: the input of the first step, recomputed or true, when the part is done.
        of_params: the gradients of the parameters, by step.
        of_cond: that of the condition, summed over the steps.
        worst: the largest drift, where the host knows it.
        redone: the number of steps that were.
    """

    def __init__(self, ctx: Any, grad_log_det: Tensor | None = None) -> None:
        self.z, cond, *rest = ctx.saved_tensors  # once: hooks of torch.utils.checkpoint allow no more
        counts = len(ctx.states), len(ctx.states) + len(ctx.seen)
        self.states: dict[int, Tensor] = dict(zip(ctx.states, rest[: counts[0]], strict=True))
        self._seen: dict[int, Tensor] = dict(zip(ctx.seen, rest[counts[0] : counts[1]], strict=True))
        self.steps: Sequence[Step] = ctx.steps
        given, self._raw = _given(self.steps, ctx.fold, cond, ctx.needs_input_grad[4], rest[counts[1] :])
        self.given = [own._replace(memo=memo) for own, memo in zip(given, ctx.memos, strict=True)]
        self._ctx, self._grad_log_det = ctx, grad_log_det
        self.start: Tensor | None = None
        self.of_params: list[Sequence[Tensor | None]] = [()] * len(self.steps)
        self._of_maps: list[tuple[Tensor, ...]] = [()] * len(self.steps)
        self.of_cond = GradientSum()
        self.worst, self.redone = 0.0, 0

    def inverted(self, z: Tensor, grad: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
        """Compute the gradient of the input with recomputed states, and their worst drift, a scalar tensor.

        What drifts beyond the limit is redone. On a GPU, where reading a value stops the stream, that is decided once,
        of all steps; without a limit never.
        """
        at_the_end = limit is not None and not can_read(z)
        segments = list(pairwise(sorted({0, *self.states, len(self.steps)})))[::-1]
        grad_z, drifts = grad, []
        for first, end in segments:
            of_cond, y, found, worst = GradientSum(), z, grad, []
            for k in reversed(range(first, end)):
                true = self.states.get(k)
                y, found = self._step(k, y, true, found, of_cond)
                worst.append(projected_drift(y, self._seen[k]) if true is None else anchor_drift(y, true))
            drifts.append(torch.stack(worst).amax())
            self.start = self.states.get(first, y)
            if limit is not None and not at_the_end and not float(drifts[-1]) <= limit:
                found = self._redo(first, end, grad)
            else:
                self.of_cond.add(of_cond.result())
            z, grad = self.start, found
        drift = torch.stack(drifts).amax()
        if limit is not None:
            self.worst = float(drift)
        if limit is not None and at_the_end and not self.worst <= limit:
            self.of_cond, grad = GradientSum(), grad_z
            for first, end in segments:
                grad = self._redo(first, end, grad)
        return grad, drift

    def _redo(self, first: int, end: int, grad: Tensor) -> Tensor:
        """Run steps first .. end - 1 forward from the anchor at or before the first, then differentiate them."""
        self.redone += end - first
        if first not in self.states:
            self.states[first], count = _restored(self._ctx.part.whole, self._ctx.part.index)
            self.redone += count
        self.start = self.states[first]
        for k in range(first, end - 1):
            self.states[k + 1] = self.steps[k].repeat(self.states[k], self.given[k])
        grad = self.differentiated(first, end, grad)
        for k in range(first + 1, end):
            del self.states[k]
        return grad

    def differentiated(self, first: int, end: int, grad: Tensor) -> Tensor:
        """Compute the gradient of the input of steps first .. end - 1, whose inputs are all known."""
        for k in reversed(range(first, end)):
            _, grad = self._step(k, None, self.states[k], grad, self.of_cond)
        return grad

    def _step(
        self, k: int, y: Tensor | None, x: Tensor | None, grad: Tensor, of_cond: GradientSum
    ) -> tuple[Tensor, Tensor]:
        assert self._grad_log_det is not None  # else nothing is differentiated
        found = self.steps[k].backward(y, x, grad, self._grad_log_det, self.given[k])
        of_cond.add(found.grad_cond)
        self.of_params[k], self._of_maps[k] = found.grad_params, found.grad_map
        return found.x, found.grad_x

    def of_raw(self) -> Sequence[Tensor | None]:
        """Compute the gradients of what the maps are folded from."""
        if not any(tensor.requires_grad for tensor in self._raw):
            return [None] * len(self._raw)
        matrices, offsets, log_dets = (torch.stack(parts) for parts in zip(*self._of_maps, strict=True))
        found: Sequence[Tensor | None] = self._ctx.fold.gradients(self._raw, matrices, offsets, log_dets)
        return found
