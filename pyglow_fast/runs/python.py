"""The Python executor: runs of any nets and any invertible steps, over the registered ops.

``in_turn`` calls part after part as ordinary torch code: what autograd, torch.compile, torch.func and exports see.
``recomputed`` is the autograd function of steps that the backward runs again. Both go the way that a run has.

Of what is recomputed the forward runs without a record. What it keeps of a part are its input, its output and the
states at its anchors, or in mode "checkpoint" those of all steps, and of every other state its projection on random
signs (see drift.py). The backward recomputes the states step by step and holds each against its projection. A part that
has drifted is redone from its anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._core.derivatives import Saved, apply, differentiable_once
from pyglow_fast._core.dry import device_of
from pyglow_fast._core.tracing import call_untraced
from pyglow_fast.nets.masks import mask_of, positions_of, without_padding
from pyglow_fast.nets.run import GradientSum
from pyglow_fast.runs.deferred import accepted
from pyglow_fast.runs.description import NetCoupling, Run
from pyglow_fast.runs.drift import DriftControl, anchor_drift, lowest_of, project, projected_drift
from pyglow_fast.runs.maps import (
    ChannelMap,
    Folding,
    MapInverse,
    undone_gradients,
    unstack_maps,
)
from pyglow_fast.runs.parts import Part, RunPass, cut, part_limit
from pyglow_fast.runs.python_steps import Given, Step, magnitudes


def in_turn(
    run: Run,
    x: Tensor,
    cond: Tensor | None = None,
    budget: str | int | None = None,
    inverses: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Map x to z and log_det (N,) as the run says: one pass over the state between two nets.

    x is as the masks of the couplings want it. With a budget nets run in chunks, without a record; else whole.
    ``inverses`` are those of all maps of a run that is turned, where they are known, stacked as a state meets them:
    matrices, offsets, log_dets and, of gathers, indices.
    """
    maps, total = _folded(run, inverses)
    masked_by = cond if run.frame.masked else None
    log_det: Tensor | None = None
    if total is not None:
        log_det = functional.per_sample(x, total) if masked_by is None else total * positions_of(masked_by)
    if not run.behind:
        maps = [None, *maps] if run.inverse else [*maps, None]
    for coupling, own in zip([None, *run.couplings], maps, strict=True):  # each with the map that follows it
        if coupling is not None:
            net_out = coupling.run(x, cond, budget)
            if run.watch is not None:
                run.watch(magnitudes(x, net_out, coupling.spec))
            x, gained = _coupled(coupling, x, net_out, own, run.inverse)
            log_det = gained if log_det is None else log_det + gained
        elif own is not None:
            x = _mixed(x, own)
        if masked_by is not None and own is not None:  # a map has put its offset there
            x = x * mask_of(masked_by)
        elif masked_by is not None and coupling is not None:
            x = torch.cat([x[:, : coupling.kept], without_padding(x[:, coupling.kept :], mask_of(masked_by))], dim=1)
    return x, x.new_zeros(x.shape[0]) if log_det is None else log_det


class _Unmix(NamedTuple):
    """A map that is undone, x = inverse (u - offset)."""

    inverse: Tensor
    offset: Tensor
    source: Tensor | None


def _folded(run: Run, inverses: Sequence[Tensor]) -> tuple[Sequence[ChannelMap | _Unmix | None], Tensor | None]:
    """The map at each place, undone in a run that is turned, and the log-dets' sum, if any."""
    places = run.places
    if not any(places):
        return [None] * len(places), None
    raw, folding = run.folding()
    if not run.inverse or run.inverted:
        each = unstack_maps(folding.stacked(raw)) if folding.swaps else folding.each(raw)
        known = [own.log_det for own in each if own is not None]
        return each, known[0] if len(known) == 1 else torch.stack(known).sum()
    stacked = folding.stacked(raw)
    matrices, indices = (inverses[0], inverses[3] if len(inverses) > 3 else None) if inverses else stacked.inverse()
    gathers = [None] * len(matrices) if indices is None else indices.unbind()
    undone = map(_Unmix, matrices.unbind(), stacked.offset.unbind(), gathers)
    return [one if own else None for one, own in zip(undone, places, strict=True)], -stacked.log_det.sum()


def _mixed(x: Tensor, own: ChannelMap | _Unmix) -> Tensor:
    if isinstance(own, _Unmix):
        return functional.channel_unmix(x, own.inverse, own.offset, own.source)
    return functional.channel_mix(x, own.matrix, own.offset, own.source)


def _coupled(
    coupling: NetCoupling, x: Tensor, net_out: Tensor, own: ChannelMap | _Unmix | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """A coupling, or its inverse, and the map behind it in one pass where there is such a kernel."""
    spec = coupling.spec
    if inverse:
        if isinstance(own, _Unmix):
            return functional.coupling_mix_inverse(x, net_out, own.inverse, own.offset, spec, own.source)
        x, log_det = functional.coupling_inverse(x, net_out, spec)
        return x if own is None else _mixed(x, own), log_det
    if own is None:
        return functional.coupling(x, net_out, spec)
    assert isinstance(own, ChannelMap)
    return functional.coupling_mix(x, net_out, own.matrix, own.offset, spec, own.source)


def recomputed(
    steps: Sequence[Step], control: DriftControl | None, x: Tensor, cond: Tensor | None = None, run: Run | None = None
) -> tuple[Tensor, Tensor]:
    """Map x to z and log_det (N,) through steps, at least one, that the backward runs again.

    torch.compile does not trace it. Each part is a node of its own, see parts.py. Without a ``control`` all states are
    kept; the channel maps are those of the ``run`` whose couplings the steps are, if there is one.
    """
    if torch.compiler.is_compiling():
        return call_untraced(recomputed, steps, control, x, cond, run)
    step_bytes = [sum(tensor.nbytes for tensor in step.params) for step in steps]
    limit = part_limit(device_of(x).type == "cpu", step_bytes, x.nbytes)
    run_pass = RunPass(
        control, cut(step_bytes, 1 if run is None else run.map_bytes, limit, limit or 0), knows_starts=True
    )
    log_dets = []
    for part in run_pass.parts:
        own = steps[part.first : part.end]
        raw, folding = ([], None) if run is None else run.folding(part.first, part.end)
        tensors = [*(tensor for step in own for tensor in step.params), *raw]
        run_pass.note_inputs(part.first, x.device, (x, cond, *tensors))
        x, log_det = apply(_RunSteps, own, part, folding, x, cond, *tensors)
        log_dets.append(log_det)
    return x, functional.summed(log_dets)


def _given(
    steps: Sequence[Step], folding: Folding | None, cond: Tensor | None, needs_cond: bool, tensors: Sequence[Tensor]
) -> tuple[list[Given], Sequence[Tensor], MapInverse | None]:
    """Deal the flat list of parameters, and of what the maps are folded from, out to the steps.

    Second, these raw tensors; third, where the steps undo maps, the inverses of all, stacked.
    """
    found, at = [], 0
    for step in steps:
        found.append(Given(cond, needs_cond, tensors[at : at + len(step.params)]))
        at += len(step.params)
    raw = tensors[at:]
    if folding is None:
        return found, raw, None
    stacked = ChannelMap(*folding(raw))
    found = [own._replace(map=one) for own, one in zip(found, unstack_maps(stacked), strict=True)]
    if not steps[0].inverse:
        return found, raw, None
    matrices, indices = undone = stacked.inverse()
    each = zip(matrices.unbind(), [None] * len(steps) if indices is None else indices.unbind(), strict=True)
    return [own._replace(undone=one) for own, one in zip(found, each, strict=True)], raw, undone


class _RunSteps(torch.autograd.Function):
    """z, log_det of a part."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Sequence[Step],
        part: Part,
        folding: Folding | None,
        x: Tensor,
        cond: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """z, log_det (N,)."""
        keeps_states = part.run_pass.keeps_states
        keep = set(range(len(steps)) if keeps_states else [0, *part.anchors])
        states: dict[int, Tensor] = {}
        seen: dict[int, Tensor] = {}
        memos, log_dets, z, lowest = [], [], x, x.dtype
        for k, (step, given) in enumerate(zip(steps, _given(steps, folding, cond, False, tensors)[0], strict=True)):
            if k in keep:
                states[k] = z
            else:
                seen[k] = project(z)
            z, log_det, memo, own_lowest = step.forward(z, given)
            lowest = lowest_of(lowest, own_lowest)
            memos.append(memo)
            log_dets.append(log_det)
        z = z.clone() if z is x else z  # which a step may hand on; an output of a function must be its own
        ctx.steps, ctx.part, ctx.folding, ctx.memos, ctx.lowest = steps, part, folding, memos, lowest
        ctx.states, ctx.seen = list(states), list(seen)
        # The output is the input of the part behind, and takes no memory of its own.
        ctx.save_for_backward(None if keeps_states else z, cond, *states.values(), *seen.values(), *tensors)
        return z, functional.summed(log_dets)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond and the parameters."""
        own, part, drifted = _Backward(ctx, saved, grad_log_det), ctx.part, None
        run_pass: RunPass = part.run_pass
        if run_pass.control is None or run_pass.keeps_states:
            run_pass.checkpointed(part, grad_z.device)
            grad_x = own.differentiated(0, len(ctx.steps), grad_z)
        else:
            limit = run_pass.control.limit(grad_z.dtype, ctx.lowest)
            grad_x, worst = own.inverted(grad_z)
            if run_pass.defers(grad_z):
                drifted = run_pass.judged(part, worst, limit, 0)
            else:
                drift, redone = float(worst), 0
                if not drift <= limit:
                    grad_x, redone = own.redone(grad_z), len(ctx.steps)
                run_pass.judged(part, drift, limit, redone)
        of_params = [grad for grads in own.of_params for grad in grads]
        grads = (grad_x, own.of_cond.result(), *of_params, *own.of_raw())
        return (None, None, None, *accepted(grads, drifted))


class _Backward:
    """The backward of a part. A step that is redone overwrites the gradients of its parameters.

    ``of_params`` are those gradients by step, ``of_cond`` is that of the condition, summed over the steps.
    """

    def __init__(self, ctx: Any, saved: Saved, grad_log_det: Tensor) -> None:
        self._z, cond, *rest = saved
        counts = len(ctx.states), len(ctx.states) + len(ctx.seen)
        self._states: dict[int, Tensor] = dict(zip(ctx.states, rest[: counts[0]], strict=True))
        self._seen: dict[int, Tensor] = dict(zip(ctx.seen, rest[counts[0] : counts[1]], strict=True))
        self._steps: Sequence[Step] = ctx.steps
        found = _given(self._steps, ctx.folding, cond, ctx.needs_input_grad[4], rest[counts[1] :])
        given, self._raw, self._undone = found
        self._given = [own._replace(memo=memo) for own, memo in zip(given, ctx.memos, strict=True)]
        self._folding, self._grad_log_det = ctx.folding, grad_log_det
        self.of_params: list[Sequence[Tensor | None]] = [()] * len(self._steps)
        self._of_maps: list[tuple[Tensor, ...]] = [()] * len(self._steps)
        self.of_cond = GradientSum()

    def inverted(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradient of the input with recomputed states, and their worst drift, a scalar tensor."""
        z, drifts = self._z, []
        for k in reversed(range(len(self._steps))):
            true = self._states.get(k)
            found, grad = self._step(k, z, true, grad)
            back = self._steps[k].inverse
            drift = projected_drift(found, self._seen[k], back) if true is None else anchor_drift(found, true, back)
            drifts.append(drift)
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
        if self._folding is None or not any(tensor.requires_grad for tensor in self._raw):
            return [None] * len(self._raw)
        matrices, offsets, log_dets = (torch.stack(parts) for parts in zip(*self._of_maps, strict=True))
        if self._undone is not None:
            matrices, offsets = undone_gradients(self._undone, matrices, offsets)
        found: Sequence[Tensor | None] = self._folding.gradients(self._raw, matrices, offsets, log_dets)
        return found
