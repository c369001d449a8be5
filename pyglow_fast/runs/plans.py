"""Plans of memory for runs of steps, made when a forward first sees shapes that there is no plan for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._core.backend import require
from pyglow_fast._core.float32 import autocast_is_on
from pyglow_fast._core.torch_private import AnyConv
from pyglow_fast._core.tracing import has_hooks
from pyglow_fast.functional import ops
from pyglow_fast.runs.drift import DriftControl
from pyglow_fast.runs.dry_run import dry_run, twin_of, without_values
from pyglow_fast.runs.planner import NotCompiledError, RunPlan, plan_memory, refuse_bytes

REMEMBERED = 16  # plans
BESIDE = 4096  # bytes of tables of pointers, and of the number that the caller makes of the outputs
Inputs = Sequence[Tensor | None]
Forward = Callable[[Any, Inputs], Sequence[Tensor]]


class _Scratch:
    """Holds what a convolution of torch's takes besides, while it runs in a dry run, as those of priors do."""

    def __init__(self, conv: AnyConv) -> None:
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


class Plans:
    """The plans of a model or a run of steps, by shapes; in a dry run the one that is ``tried``."""

    def __init__(self) -> None:
        self._known: dict[Hashable, RunPlan] = {}
        self.tried: RunPlan | None = None

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        """Copies of a model begin without plans, which are of its own nets."""
        return Plans, ()

    def of(self, model: Any, inputs: Inputs, forward: Forward, *settings: Hashable, inverse: bool = False) -> RunPlan:
        """Give the plan of all steps in a pass that begins now, made anew for shapes that have none.

        Args:
            model: that has these plans, whose ``_sequences()`` are its runs, in order.
            inputs: tensors that the pass gets.
            forward: calls a model with inputs, and gives the outputs that the backward begins with.
            settings: what decides the bytes besides.
            inverse: the pass goes from latents to data; the plan counts steps in its order.

        Raises:
            ValueError: no plan takes so few bytes, or steps are not computed by csrc/run.
        """
        if self.tried is not None:
            return self.tried
        controls = [run.control_of(inverse) for run in model._sequences()]
        for control in controls:
            control.begin()
        # Anchors that move apart take less than those that a control begins with. Drift moves them closer together.
        first = [control.first_spacing for control in controls]
        now = [min(control.spacing, own) for control, own in zip(controls, first, strict=True)]
        key = (_key(model, inputs), model.memory, model._sequences()[0].memory_budget, tuple(now), settings, inverse)
        plan = self._known.get(key)
        if plan is None:
            plan = _made(model, inputs, forward, now, first)
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = plan
        return plan


def _key(model: nn.Module, inputs: Inputs) -> Hashable:
    """Make a key of all that decides the bytes of a forward: its inputs, parameters, nets, autocast and mode."""
    given = [None if x is None else (x.shape, x.dtype, x.device, x.is_contiguous(), x.requires_grad) for x in inputs]
    own = [(parameter.shape, parameter.requires_grad) for parameter in model.parameters()]
    device_type = next(x for x in inputs if x is not None).device.type
    autocast = torch.get_autocast_dtype(device_type) if autocast_is_on(device_type) else None
    couplings: list[Any] = [
        module for module in model.modules() if hasattr(module, "precision") and hasattr(module, "net")
    ]
    nets = [(coupling.precision, type(coupling.net), coupling.net.training) for coupling in couplings]
    return (*given, *own, *nets, autocast, model.training)


def _made(model: Any, inputs: Inputs, forward: Forward, now: list[int], first: list[int]) -> RunPlan:
    """A plan with anchors that lie as they do now; with a warning as they did at first, where that takes too much."""
    runs, budget, like = model._sequences(), model.memory, next(x for x in inputs if x is not None)
    parts = [part for run in runs for part in run.modules()]
    if not (all(run.is_fused for run in runs) and not any(map(has_hooks, parts)) and ops.run_on(like)):
        refuse_bytes(budget)
    bytes_of, n_steps = _dry_step(model, inputs, forward), sum(map(len, runs))

    def planned(spacings: list[int]) -> RunPlan:
        try:
            return plan_memory(partial(bytes_of, spacings), n_steps, budget, runs[0].memory_budget, like.device.type)
        except NotCompiledError:
            refuse_bytes(budget)
            raise

    try:
        return planned(now)
    except ValueError:
        if now == first:
            raise
    plan = planned(first)  # which may raise
    warnings.warn(
        f"recomputed states drift, so that more of them are stored than the {budget} bytes of memory= allow: "
        "this training step takes more",
        stacklevel=2,
    )
    return plan


def _dry_step(model: Any, inputs: Inputs, forward: Forward) -> Callable[[list[int], RunPlan], int]:
    """Make a function that runs a training step of a model, or of a run of steps, without values; see :meth:`Plans.of`.

    It is given the spacing of each run's anchors, and a plan, and tells the most bytes at any time.
    """
    device = next(model.parameters()).device
    with dry_run(device):
        twin: Any = twin_of(model)
        known = {id(x): without_values(x) for x in inputs if x is not None}
    given = [None if x is None else known[id(x)] for x in inputs]
    own = {part for run in twin._sequences() for part in run.modules()}
    for module in twin.modules():
        if hasattr(module, "_known_initialized"):  # an ActNorm
            module._known_initialized = True  # or a forward in training would look at values
        if isinstance(module, AnyConv) and module not in own:
            _Scratch(module)

    def bytes_of(spacings: list[int], plan: RunPlan) -> int:
        for run, spacing in zip(twin._sequences(), spacings, strict=True):
            run.control = run.inverse_control = DriftControl(run.control.n_steps, spacing)
        twin._plans.tried = plan
        with dry_run(device) as count, torch.enable_grad():
            outputs = [out for out in forward(twin, given) if out.requires_grad]
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
            most = int(count.most) + BESIDE
        for x in known.values():
            x.grad = None
        return most

    return bytes_of
