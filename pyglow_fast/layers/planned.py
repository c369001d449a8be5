"""Plans of memory for runs of steps, made when a forward first sees shapes that there is no plan for."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from pyglow_fast import ops
from pyglow_fast._backend import require
from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.flow_step import FlowStep, couplings_of
from pyglow_fast.reference import autocast_is_on, n_positions
from pyglow_fast.reversible import DriftControl
from pyglow_fast.reversible.drift import DriftRecord
from pyglow_fast.reversible.dry_run import DryRun, twin_of, without_values
from pyglow_fast.reversible.planner import Bytes, MemoryPlan, NetSize, RunPlan, RunTimes, Split, plan_memory
from pyglow_fast.reversible.setting import memory_text

REMEMBERED = 16  # plans
BESIDE = 4096  # bytes of tables of pointers, and of the number that the caller makes of the outputs
M = TypeVar("M", bound=nn.Module)


def check_runs(runs: bool, budget: str | int) -> None:
    """Refuse a number of bytes where steps are not computed by csrc/run.

    Raises:
        ValueError: with what to give instead.
    """
    expected = 'a mode such as "reversible" where the compiled run does not compute all steps'
    expected += " (nets of your own or with a border, hooks, other modules, masks, no extension)"
    expect(runs, "memory", expected, memory_text(budget))


class _Scratch:
    """Holds what a convolution of torch's takes besides, while it runs in a dry run, as those of priors do."""

    def __init__(self, conv: nn.modules.conv._ConvNd) -> None:
        self._conv, self._held = conv, None
        conv.register_forward_pre_hook(lambda _, inputs: self._take(inputs[0]))
        conv.register_forward_hook(lambda *_: self._drop())
        conv.register_full_backward_pre_hook(lambda *_: self._take(self._like))
        conv.register_full_backward_hook(lambda *_: self._drop())

    def _take(self, x: Tensor) -> None:
        self._like = x.new_empty(()).expand(x.shape)
        self._held = require().convolution_scratch(x, self._conv.out_channels, self._conv.weight[0, 0].numel())

    def _drop(self) -> None:
        self._held = None


class DryStep(Generic[M]):
    """A training step of a model, or of a run of steps, without values.

    Args:
        model: of which.
        runs: gives the runs in it, in the order of the forward.
        spacings: of the anchors of each run.
        inputs: tensors that the step gets.
        forward: computes outputs that the backward begins with, from a model, plans of its runs and inputs.
        budget: bytes, for a refusal.
    """

    def __init__(
        self,
        model: M,
        runs: Callable[[M], Sequence[Any]],
        spacings: Sequence[int],
        inputs: Sequence[Tensor | None],
        forward: Callable[[M, Sequence[RunPlan], list[Tensor | None]], Sequence[Tensor]],
        budget: int,
    ) -> None:
        like = next(tensor for tensor in inputs if tensor is not None)
        parts = [part for run in runs(model) for part in run.modules()]
        fused = all(run.is_fused for run in runs(model)) and not any(map(has_hooks, parts))
        check_runs(fused and ops.run_on(like), budget)
        self._device, self._forward = like.device, forward
        self._known: dict[tuple[RunPlan, ...], tuple[Bytes, dict[int, Any]]] = {}
        with DryRun(self._device):
            self._twin = twin_of(model)
            known: dict[int, Tensor] = {id(x): without_values(x) for x in inputs if x is not None}
            self._inputs = [None if x is None else known[id(x)] for x in inputs]
        self._runs, self._spacings = runs(self._twin), spacings
        own = {part for run in self._runs for part in run.modules()}
        for module in self._twin.modules():
            if isinstance(module, ActNorm):
                module._known_initialized = True  # or a forward in training would look at values
            if isinstance(module, nn.modules.conv._ConvNd) and module not in own:
                _Scratch(module)
        self._marks: list[int] = []  # bytes before and behind the forward of each run
        for run in self._runs:
            run.control.deferred = False
            run.register_forward_pre_hook(lambda *_: self._mark())
            run.register_forward_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        self._marks.append(self._dry.now)

    def bytes_of(self, plans: Sequence[RunPlan]) -> Bytes:
        """Go through the step with a plan of each run."""
        key = tuple(plans)
        if key not in self._known:
            self._known[key] = self._run(plans)
        return self._known[key][0]

    def _run(self, plans: Sequence[RunPlan]) -> tuple[Bytes, dict[int, Any]]:
        for run, spacing in zip(self._runs, self._spacings, strict=True):
            run.control.learnt = DriftRecord(spacing)  # no drift is found, and anchors would move apart
        self._marks = []
        self._dry = DryRun(self._device)
        with self._dry as dry, torch.enable_grad():
            outputs = [out for out in self._forward(self._twin, plans, self._inputs) if out.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
            most, noted = dry.most + BESIDE, dry.noted
        for x in self._inputs:
            if x is not None:
                x.grad = None
        kept = [behind - before for before, behind in zip(self._marks[::2], self._marks[1::2], strict=True)]
        return Bytes(kept, most), noted

    def times(self, budget: str | int) -> list[RunTimes]:
        """Estimate the times of each run, for a budget of one net's activations."""
        plans = tuple(RunPlan.of_mode("reversible", len(run), budget) for run in self._runs)
        self.bytes_of(plans)
        noted = self._known[plans][1]
        return [_times(run, noted.get(id(run))) for run in self._runs]


def _times(run: Any, entered: Any) -> RunTimes:
    steps: list[FlowStep] = run.flow_steps()
    stops = [k + 1 for k, step in enumerate(steps) if step.couplings]
    places = [0, *stops[:-1], len(steps)]
    if entered is None:  # of channel maps alone
        return RunTimes(places, [[]] * (len(places) - 1), 0, False)
    own, x, _, squeezes = entered
    positions = x.shape[0] * n_positions(x) // (2 ** (x.dim() - 2) if squeezes else 1)
    sizes, at = [], 0
    for coupling, form, count in zip(couplings_of(steps), own.forms, own.counts, strict=True):
        weights = [tensor for tensor in own.nets[at : at + count] if tensor.dim() == x.dim()]
        seen = positions * (1 if coupling.board is None else 2)
        stored = seen * x.element_size() * sum(weight.shape[0] for weight in weights)
        sizes.append(NetSize(seen * sum(weight.numel() for weight in weights), form.overlap, stored))
        at += count
    each = iter(sizes)
    nets = [[next(each) for _ in step.couplings] for step in steps if step.couplings]
    return RunTimes(places, nets, x.nbytes, not run.control.checkpoints)


def planned_spacing(control: DriftControl) -> int:
    """The distance between stored states (anchors) that a plan reckons with.

    That is the distance which a drift control begins with, since anchors that move apart take less; or the present one,
    where a drift has moved them closer together.
    """
    return min(control.spacing, control.first_spacing)


def run_key(x: Tensor, couplings: Sequence[Coupling]) -> Hashable:
    """What decides how steps run on a state like x, besides shapes: its form, precisions, autocast and modules."""
    device_type = x.device.type
    autocast = torch.get_autocast_dtype(device_type) if autocast_is_on(device_type) else None
    nets = tuple((coupling.precision, weakref.ref(coupling.net), coupling.net.training) for coupling in couplings)
    return x.dtype, x.is_contiguous(), device_type, autocast, nets


class Plans:
    """The plans of a model or a run of steps, by shapes, and what the last forward did.

    Attributes:
        last: the plan of the last forward.
        fixed: of each run, in a dry run.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, MemoryPlan] = OrderedDict()
        self.last: MemoryPlan | None = None
        self.fixed: Sequence[RunPlan] | None = None

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        """Copies of a model begin without plans, which are of its own nets."""
        return Plans, ()

    def of(
        self,
        controls: Sequence[DriftControl],
        key: Hashable,
        step: Callable[[Sequence[int]], DryStep[Any]],
        budget: int,
        net_budget: str | int,
        device_type: str,
    ) -> MemoryPlan:
        """Give the plan of a forward that begins now, made anew for shapes that have none.

        Args:
            controls: of the runs.
            key: tells all that decides the bytes.
            step: makes the training step, from the spacing of the anchors of each run.
            budget, net_budget, device_type: as of plan_memory.

        Raises:
            ValueError: no plan takes so few bytes, or steps are not computed by csrc/run.
        """
        now, first = [planned_spacing(control) for control in controls], [control.first_spacing for control in controls]
        known = (key, budget, net_budget, device_type, tuple(now))
        plan = self._known.get(known)
        if plan is None:
            plan = self._known[known] = self._made(now, first, step, budget, net_budget, device_type)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self.last = plan
        return plan

    @staticmethod
    def _made(
        now: list[int],
        first: list[int],
        step: Callable[[Sequence[int]], DryStep[Any]],
        budget: int,
        net_budget: str | int,
        device_type: str,
    ) -> MemoryPlan:
        try:
            return plan_memory(step(now), budget, net_budget, device_type)
        except ValueError:
            if now == first:
                raise
            plan = plan_memory(step(first), budget, net_budget, device_type)  # which may raise
            warnings.warn(
                f"recomputed states drift, so that more of them are stored than the {budget} bytes of memory= allow: "
                "this training step takes more",
                stacklevel=2,
            )
            return plan

    def report(self, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The reports of the runs, with what the last plan says of each and predicts for all."""
        if self.last is None:
            return reports
        total = {"predicted_bytes": self.last.peak, "predicted_time": self.last.time}
        told = zip(reports, self.last.splits, strict=True)
        return [report | _counts(report["steps"], split) | total for report, split in told]


def _counts(n_steps: int, split: Split) -> dict[str, int]:
    """Count the steps of a run that are inverted, checkpointed and stored, for its report."""
    inverted, stored_from = split
    return {"inverted": inverted, "checkpointed": stored_from - inverted, "stored": n_steps - stored_from}
