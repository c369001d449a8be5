"""Steps of a flow whose training memory does not grow with their number."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._dry import is_dry
from pyglow_fast._errors import check_input, expect
from pyglow_fast._tracing import call_untraced, is_watched, kernels_step_aside
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.described import described, is_runnable, maps_of
from pyglow_fast.layers.flow_step import (
    FlowStep,
    couplings_of,
    fold_in_one,
    map_behind,
    maps_log_det,
    recomputed,
    run_couplings,
    run_couplings_inverse,
    runs_fused,
)
from pyglow_fast.layers.folded import Folded
from pyglow_fast.layers.planned import Plans, check_runs
from pyglow_fast.nets.plan import budget_bytes
from pyglow_fast.nets.traits import check_net
from pyglow_fast.runs import DriftControl, ModuleStep, run_steps
from pyglow_fast.runs.planner import RunPlan
from pyglow_fast.runs.run import Maps, Steps, folded_maps, inverted_maps, run_inverse, run_plain, run_recorded
from pyglow_fast.runs.setting import parse_memory
from pyglow_fast.runs.steps import ChannelMap


def _is_initialized(step: Any) -> bool:
    """Whether nothing in a step waits for data."""
    nets = [part._modules["net"] for part in step.couplings] if type(step) is FlowStep else [step]
    if all(type(net) is CouplingNet and net.has_own_norms for net in nets):
        return bool(step.is_initialized)  # of these all is known, without a look into each module
    return all(getattr(module, "is_initialized", True) for module in step.modules())


class Run(NamedTuple):
    """K couplings of one mask with a channel map before each, and perhaps one behind the last, computed together.

    They are computed by csrc/run where it can, else in Python over the registered ops.

    Attributes:
        couplings: initialised, but for ActNorms inside their nets.
        maps: gives those before the couplings, of which a part folds its own; told whether csrc/run may fold them.
        fold: folds all maps in one batch, with a record; stacked.
        behind: folds the map behind the last coupling, or gives None.
        budget: bytes of one net's activations, or "auto".
        memory: the mode, or bytes, which only csrc/run keeps to.
        control: of the drift, in mode "reversible".
        masked: x is zero where the first channel of the condition is, and z will be; then without csrc/run.
        kept: gives what the function makes, or made before under that name.
    """

    couplings: Sequence[Coupling]
    maps: Callable[[bool], Maps]
    fold: Callable[[], ChannelMap]
    behind: Callable[[], ChannelMap | None]
    budget: str | int
    memory: str | int = "store"
    control: DriftControl | None = None
    masked: bool = False
    kept: Callable[[str, Callable[[], Sequence[Tensor]]], Sequence[Tensor]] = lambda _, make: make()

    def _entered(
        self, x: Tensor, cond: Tensor | None, squeezes: bool, backwards: bool = False
    ) -> tuple[Steps, Tensor, Tensor | None, bool] | None:
        """Describe the run for csrc/run; with x, cond and whether to squeeze as that takes them. None: it cannot.

        squeezes: x is to be squeezed. backwards: it is the run's output.
        """
        couplings = self.couplings
        if not couplings or self.masked or not is_runnable(x):
            return None
        if squeezes and (x.dim() != 4 or couplings[0].board is not None):  # kernels do not squeeze these as they read
            x, squeezes = functional.squeeze(x), False
        x, cond = couplings[-1 if backwards else 0].enter(x, cond)
        cond = None if cond is None else cond.to(x.dtype)
        found = described(couplings, self.maps(True), x, cond, squeezes, self.budget)
        return None if found is None else (found, x, cond, squeezes)

    def _chunks(self) -> str | int | None:
        """The budget of nets that run without a record, None where they may have one."""
        return None if torch.is_grad_enabled() or is_watched() else self.budget

    def forward(
        self, x: Tensor, cond: Tensor | None, squeezes: bool, mode: str = "store", records: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Map x to z and log_det (N,). The mode is "store" where no backward follows; where one may, it ``records``."""
        found, couplings = self._entered(x, cond, squeezes), self.couplings
        check_runs(found is not None or not couplings or not is_dry(x), self.memory)
        if found is not None:
            own, x, cond, squeezes = found
            if records:
                z, log_det = run_recorded(own, mode, self.control, x, cond, squeezes)
            else:
                z, log_det = run_plain(own, x, cond, squeezes, self.kept("maps", lambda: folded_maps(own)))
        elif mode == "store" or not couplings:
            x = functional.squeeze(x) if squeezes else x
            return run_couplings(couplings, self.fold(), x, cond, self._chunks(), self.masked)
        else:
            x, cond = couplings[0].enter(functional.squeeze(x) if squeezes else x, cond)
            again, control = recomputed(couplings, self.budget, self.masked), self.control
            z, log_det = run_steps(again, control if mode == "reversible" else None, x, cond, self.maps(is_runnable(x)))
        behind = self.behind()
        if behind is not None:
            z = functional.channel_mix(z, behind.matrix, behind.offset, index=behind.source)
            log_det = log_det + maps_log_det(behind, z)
        return couplings[-1].leave(z), log_det

    def inverse(
        self, z: Tensor, cond: Tensor | None, records: bool, inverses: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """Map z back to x, with minus the log-det.

        inverses: of all maps where they are known, stacked: matrices, offsets, log_dets and, of gathers, indices.
        """
        found = None if records else self._entered(z, cond, False, backwards=True)
        if found is None:
            known = (inverses[0], inverses[3] if len(inverses) > 3 else None) if inverses else None
            return run_couplings_inverse(self.couplings, self.fold(), z, cond, self._chunks(), self.masked, known)
        own, z, cond, _ = found
        behind, log_det = self.behind(), z.new_zeros(())
        if behind is not None:
            matrix, index = behind.inverse()
            z = functional.channel_unmix(z, matrix, behind.offset, index=index)
            log_det = maps_log_det(behind, z)
        before = [part[: len(self.couplings)] for part in inverses]
        x, own_log_det = run_inverse(
            own, z, cond, before or self.kept("inverses", lambda: inverted_maps(folded_maps(own)))
        )
        return self.couplings[0].leave(x), own_log_det - log_det


class ReversibleSequence(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum; what the backward needs is recomputed rather than stored.

    Memory modes, at any time by assigning to ``memory``:

    - "store": ordinary autograd. Memory grows with K and with the nets' hidden layers.
    - "checkpoint": the state of every step is kept, the nets are run again. Exact.
    - "reversible": the output and a few anchors are kept, states are recomputed by inversion: one more run of the net
      a step, as in "checkpoint". What has drifted beyond the tolerance is found and redone by checkpointing, so that
      the gradient is right in any case; the anchors' spacing adapts (docs/memory-derivation.md).

    In the last two, and always without gradients, the coupling nets of FlowSteps run in chunks of samples and rows, so
    that their activations stay within ``memory_budget``. FlowSteps are joined where they are as they come: of a
    subclass, or with couplings of one, with hooks on them, or among other modules, they run one by one, and their nets
    whole.

    Within torch.func and forward-mode AD every mode is "store", of torch's own ops: any derivative, and vmap.

    Args:
        steps: FlowSteps of one width and one mask, or any modules with ``forward(x, cond=None) -> (z, log_det)``
            and ``inverse``; their parameters must be theirs alone and their output a function of the input.
        memory: a mode; or bytes, as a number or a text such as "4GB": FlowSteps then keep what is fastest within them,
            see docs/memory.md. In a model with a budget its plan comes in their place.
        anchor_every: steps between stored states: "auto", an int, or None for none but the input. In FlowSteps, an
            injector and a coupling count as a step each; what has neither counts as none.
        tolerance: largest relative drift of a recomputed state, or None for the default by dtype and depth.
        memory_budget: bytes of one net's activations, or "auto".
        deferred_check: in mode "reversible" the host does not wait for the verdict on drift. Where a state has drifted,
            the gradients of its part of this run of steps (on a GPU all of the run), and of all that the same backward
            reaches later, are zero; the next pass counts it ("skipped" in the report) and puts the anchors closer. For
            CUDA graphs, in whose capture it is always so; else a wait costs one pause of a GPU's stream per backward,
            and nothing on a CPU.

    Shapes: x, z (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: a wrong option or input; BatchNorm in training mode; a net that uses other tensors that require a
            gradient than its parameters and inputs (in the backward).

    References: Gomez et al. 2017 (reversible backward), Kingma & Dhariwal 2018 (the steps).

    Examples:
        >>> import torch
        >>> from pyglow_fast import FlowStep, ReversibleSequence
        >>> flow = ReversibleSequence([FlowStep(4, hidden=8) for _ in range(3)], memory="reversible")
        >>> x = torch.randn(2, 4, 8, 8, requires_grad=True)
        >>> recomputed = torch.autograd.grad(flow(x)[0].square().mean(), x)
        >>> flow.memory = "store"
        >>> stored = torch.autograd.grad(flow(x)[0].square().mean(), x)
        >>> torch.allclose(*recomputed, *stored, atol=1e-6)  # the same gradient for less memory
        True
    """

    _shown = ("memory",)
    planned: RunPlan | None = None  # what the last forward did that kept to a number of bytes

    def __init__(
        self,
        steps: Sequence[nn.Module],
        memory: str | int | float = "reversible",
        anchor_every: str | int | None = "auto",
        tolerance: float | None = None,
        memory_budget: str | int = "auto",
        deferred_check: bool = False,
    ) -> None:
        super().__init__()
        expect(len(steps) > 0, "steps", "at least one step", len(steps))
        for i, step in enumerate(steps):
            invertible = isinstance(step, nn.Module) and callable(getattr(step, "inverse", None))
            expect(invertible, f"steps[{i}]", "a module with forward and inverse", type(step).__name__)
            self.add_module(str(i), step)
        own, n_states = self.flow_steps(), len(self)  # how many states of the chain there are to recompute
        if len(own) == len(self):
            widths = {step.channels for step in own}
            expect(len(widths) == 1, "steps", "FlowSteps of one width", sorted(widths))
            masks = {"channels" if step.coupling is None else step.coupling.mask for step in own}
            expect(len(masks) == 1, "steps", "FlowSteps of one mask", sorted(masks))
            n_states = len(couplings_of(own))
        self.control = DriftControl(n_states, anchor_every, tolerance, deferred_check)
        self.memory = memory
        self.memory_budget = memory_budget
        self._folded, self._plans = Folded(), Plans()

    @property
    def memory(self) -> str | int:
        """The memory mode, or the bytes that training may take."""
        return self._memory

    @memory.setter
    def memory(self, memory: str | int | float) -> None:
        self._memory = parse_memory(memory)

    @property
    def memory_budget(self) -> str | int:
        """Bytes of one net's activations, or "auto"."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: str | int) -> None:
        budget_bytes(budget, "cpu")
        self._memory_budget = budget

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(cast("list[nn.Module]", list(self._modules.values())))

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    @property
    def is_fused(self) -> bool:
        """Whether all steps are FlowSteps without hooks or overridden methods, which run joined."""
        return all(runs_fused(step) for step in self)

    def flow_steps(self) -> list[FlowStep]:
        """The steps that are FlowSteps: all, or those among other modules."""
        return [step for step in self if isinstance(step, FlowStep)]

    def forward(
        self, x: Tensor, cond: Tensor | None = None, squeeze_first: bool = False, *, plan: RunPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map x to z through all steps, with the sum of their log-dets.

        Args:
            x: (N, C, *spatial).
            cond: of the steps, or None.
            squeeze_first: x (N, C / 2^d, *(2 spatial)) is squeezed, by FlowSteps mostly as it is read.
            plan: of a model with a budget, what this run does; None: as ``memory`` says.
        """
        states, log_det = self.intermediates(x, cond, squeeze_first=squeeze_first, plan=plan)
        return states[-1], log_det

    def intermediates(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        at: Sequence[int] = (),
        squeeze_first: bool = False,
        *,
        plan: RunPlan | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Map x to the states behind the steps ``at`` and behind the last one, with the log_det of all.

        Gradients flow from each of them, in every memory mode; what is kept for that is these states.

        Args:
            x, cond, squeeze_first, plan: see :meth:`forward`.
            at: numbers of steps, ascending; -1 is not the last one, which is always there.

        Returns:
            len(at) + 1 states z (N, C, *spatial), and log_det (N,).
        """
        if at:
            self._check_at(at)
        steps: list[Any] = list(self)
        fused = self.is_fused
        fresh = self.training and not self._is_initialized()
        if squeeze_first and not fused:
            x, squeeze_first = functional.squeeze(x), False
        if fused and not squeeze_first:
            check_input("x", x, steps[0].channels, steps[0].actnorm.bias)
        if fresh:
            if self.memory in ("checkpoint", "reversible") if self._records(x, cond) else fused:
                check_net(self)  # a net that is to run in chunks, or again; what is refused must initialise nothing
            self.initialize(functional.squeeze(x) if squeeze_first else x, cond)
        records = self._records(x, cond)
        if not records or kernels_step_aside():  # a backward that recomputes is no op of torch's
            plan = RunPlan.of_mode("store", len(self), self.memory_budget)
        elif plan is None:
            plan = self._plan(x, cond, squeeze_first)
        states: list[Tensor] = []
        log_dets: list[Tensor] = []
        for begin, end in pairwise([0, *(k + 1 for k in at), len(steps)]):
            for start, stop, mode in plan.runs_between(begin, end):
                squeezes = squeeze_first and start == 0
                x, log_det = self._through(steps[start:stop], fused, x, cond, squeezes, mode, plan.budget, records)
                log_dets.append(log_det)
            states.append(x)
        return states, functional.summed(log_dets)

    def _check_at(self, at: Sequence[int]) -> None:
        last = len(self) - 1
        whole = isinstance(at, Sequence) and all(type(step) is int for step in at)
        expect(whole, "at", "a sequence of ints", repr(at))
        ascending = all(a < b for a, b in zip([-1, *at], [*at, last], strict=True))
        expect(ascending, "at", f"ascending numbers of steps in 0..{last - 1}", list(at))

    def _records(self, x: Tensor, cond: Tensor | None) -> bool:
        """Whether autograd asks for a backward."""
        own = (tensor for module in self.modules() for tensor in module._parameters.values())
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in chain((x, cond), own)
        )

    def _through(
        self,
        steps: list[nn.Module],
        fused: bool,
        x: Tensor,
        cond: Tensor | None,
        squeezes: bool,
        mode: str,
        budget: str | int,
        records: bool,
    ) -> tuple[Tensor, Tensor]:
        """z and log_det of neighbouring steps in one mode; fused: all are FlowSteps as they come."""
        if torch.compiler.is_compiling() and mode != "store":
            arguments = (self, steps, fused, x, cond, squeezes, mode, budget, records)
            return call_untraced(ReversibleSequence._through, *arguments)
        if fused:
            return self._run_of(cast("list[FlowStep]", steps), budget).forward(x, cond, squeezes, mode, records)
        check_runs(not is_dry(x), self.memory)
        if mode != "store":
            again = [ModuleStep(step, f"steps[{k}]") for k, step in enumerate(steps)]
            return run_steps(again, self.control if mode == "reversible" else None, x, cond)
        total = x.new_zeros(x.shape[0])
        for step in steps:
            x, log_det = step(x) if cond is None else step(x, cond)
            total = total + log_det
        return x, total

    def _run_of(self, steps: list[FlowStep], budget: str | int) -> Run:
        """The run of FlowSteps as they come."""
        by_step = [step.couplings for step in steps]
        return Run(
            [coupling for own in by_step for coupling in own],
            lambda runnable: maps_of(steps, by_step, runnable),
            lambda: fold_in_one(steps),
            lambda: map_behind(steps),
            budget,
            self.memory,
            self.control,
            kept=lambda name, make: self._folded.get((name, id(steps[0]), len(steps)), make),
        )

    def _plan(self, x: Tensor, cond: Tensor | None, squeeze_first: bool) -> RunPlan:
        """What a forward that is recorded does, of a run that is not told by its model."""
        budget = self.memory
        if isinstance(budget, str):
            return RunPlan.of_mode(budget, len(self), self.memory_budget)
        if torch.compiler.is_compiling():
            return call_untraced(ReversibleSequence._plan, self, x, cond, squeeze_first)

        def forward(twin: ReversibleSequence, inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
            x, cond = inputs
            assert x is not None
            return twin(x, cond, squeeze_first)

        self.planned = self._plans.of(self, (x, cond), forward, squeeze_first)
        return self.planned

    def _sequences(self) -> list[ReversibleSequence]:
        """The runs that a plan is made for."""
        return [self]

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, from the last step to the first."""
        if self.is_fused:
            steps = self.flow_steps()
            check_input("z", z, steps[0].channels, steps[0].actnorm.bias)
            return self._run_of(steps, self.memory_budget).inverse(z, cond, self._records(z, cond))
        log_det = z.new_zeros(z.shape[0])
        for step in reversed(list(self)):
            z, step_log_det = step.inverse(z) if cond is None else step.inverse(z, cond)  # type: ignore[operator]
            log_det = log_det + step_log_det
        return z, log_det

    @torch.no_grad()
    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise step after step from data, each from the output of those before it; returns z."""
        for step in self:
            if hasattr(step, "initialize"):
                x = step.initialize(x, cond)  # type: ignore[operator]
            else:
                x = (step(x) if cond is None else step(x, cond))[0]
        return x

    def _is_initialized(self) -> bool:
        return all(map(_is_initialized, self._modules.values()))

    def folded(self) -> contextlib.AbstractContextManager[None]:
        """A context in which what inference makes of the parameters is kept from call to call.

        Else steps are folded anew for each call. No write to a parameter, and no change of a module, is noticed inside.
        """
        return self._folded.keeping()

    def memory_report(self) -> dict[str, Any]:
        """Report mode or budget, spacing of the anchors, drift, and what was redone so far.

        With a budget also how many steps the last training step has "inverted", "checkpointed" and "stored", and
        the "predicted_bytes" of its plan.
        """
        own = {"memory": self.memory, "steps": len(self), **self.control.report()}
        return own if isinstance(self.memory, str) or self.planned is None else own | self.planned.report(len(self))

    def get_extra_state(self) -> Tensor:
        """The drift control's state, saved with the weights."""
        return self.control.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue with a saved drift control."""
        self.control.load_state(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "_extra_state", self.control.state())  # of weights without it: converted ones
        super()._load_from_state_dict(state_dict, prefix, *args)
