"""Steps of a flow whose training memory does not grow with their number."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._dry import is_dry
from pyglow_fast._errors import check_input, expect
from pyglow_fast._tracing import call_untraced, is_watched, kernels_step_aside
from pyglow_fast.coupling_nets.plan import budget_bytes
from pyglow_fast.coupling_nets.traits import check_net
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.described import entered, is_runnable, maps_of
from pyglow_fast.layers.flow_step import (
    ChannelMap,
    FlowStep,
    Recorded,
    couplings_of,
    map_behind,
    maps_log_det,
    recomputed,
    run_couplings,
    run_couplings_inverse,
    runs_fused,
)
from pyglow_fast.layers.folded import Folded
from pyglow_fast.layers.permutation import InvConv, Permute
from pyglow_fast.layers.planned import Plans, check_runs
from pyglow_fast.layers.ranks import refused_alike
from pyglow_fast.reversible import DriftControl, ModuleStep, run_steps
from pyglow_fast.reversible.planner import RunPlan
from pyglow_fast.reversible.run import folded_maps, inverted_maps, run_inverse, run_plain, run_recorded
from pyglow_fast.reversible.setting import parse_memory
from pyglow_fast.reversible.steps import Step


def _is_initialized(step: Any) -> bool:
    """Whether nothing in a step waits for data."""
    own = type(step) is FlowStep and type(step._modules["permutation"]) in (InvConv, Permute)
    nets = [part._modules["net"] for part in step.couplings] if own else ()
    if own and all(type(net) is CouplingNet and net.has_own_norms for net in nets):
        return bool(step.is_initialized)  # of these all is known, without a look into each module
    return all(getattr(module, "is_initialized", True) for module in step.modules())


def _through(behind: ChannelMap | None, z: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
    """Map z by what is behind the last coupling, if anything is."""
    if behind is None:
        return z, log_det
    z = functional.channel_mix(z, behind.matrix, behind.offset, index=behind.source)
    return z, log_det + maps_log_det([behind], z)


class _Run(NamedTuple):
    """Neighbouring steps that are computed in one way.

    Args:
        steps: at least one.
        fused: all are FlowSteps as they come.
        mode: "store", "checkpoint" or "reversible".
        records: a backward may follow; always so in other modes than "store".
        squeeze_first: x is squeezed as it is read.
        budget: bytes of one net's activations, or "auto".
    """

    steps: list[nn.Module]
    fused: bool
    mode: str
    records: bool
    squeeze_first: bool
    budget: str | int

    @property
    def flow_steps(self) -> list[FlowStep]:
        """The steps of a fused run."""
        return cast("list[FlowStep]", self.steps)


class ReversibleSequence(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum; what the backward needs is recomputed rather than stored.

    Memory modes, at any time by assigning to ``memory``:

    - "store": ordinary autograd. Memory grows with K and with the nets' hidden layers.
    - "checkpoint": the state of every step is kept, the nets are run again. Exact.
    - "reversible": the output and a few anchors are kept, states are recomputed by inversion: one more run of the net
      a step, as in "checkpoint". What has drifted beyond the tolerance is found and redone by checkpointing, so that
      the gradient is right in any case; the anchors' spacing adapts (docs/memory-derivation.md).

    In the last two, and always without gradients, the coupling nets of FlowSteps run in chunks of samples and rows, so
    that their activations stay within ``memory_budget``. FlowSteps are joined where they are as they come: with methods
    overridden in a subclass, with hooks on them, or among other modules, they run one by one, and their nets whole.

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
        if all(isinstance(step, FlowStep) for step in steps):
            widths = {cast(FlowStep, step).channels for step in steps}
            expect(len(widths) == 1, "steps", "FlowSteps of one width", sorted(widths))
            couplings = [cast(FlowStep, step).coupling for step in steps]
            masks = {"channels" if coupling is None else coupling.mask for coupling in couplings}
            expect(len(masks) == 1, "steps", "FlowSteps of one mask", sorted(masks))
        self.control = DriftControl(self._chain_length(), anchor_every, tolerance, deferred_check)
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

    def _chain_length(self) -> int:
        """How many states of a chain there are to recompute: one for each coupling and injector of FlowSteps."""
        steps = self.flow_steps()
        return len(couplings_of(steps)) if len(steps) == len(self) else len(self)

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
        if squeeze_first and (not fused or any(part.board is not None for part in steps[0].couplings)):
            x, squeeze_first = functional.squeeze(x), False
        if fused and not squeeze_first:
            bias = steps[0].actnorm.bias
            with refused_alike(bias.device) if fresh else contextlib.nullcontext():
                check_input("x", x, steps[0].channels, bias)
        if fresh:
            if self.memory in ("checkpoint", "reversible") if self._records(x, cond) else fused:
                check_net(self)  # a net that is to run in chunks, or again; what is refused must initialise nothing
            self._initialize_steps(x, cond, squeeze_first)
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
                x, log_det = self._run(_Run(steps[start:stop], fused, mode, records, squeezes, plan.budget), x, cond)
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
        return torch.is_grad_enabled() and (
            x.requires_grad
            or (cond is not None and cond.requires_grad)
            or any(
                tensor.requires_grad
                for module in self.modules()
                for tensor in module._parameters.values()
                if tensor is not None
            )
        )

    def _run(self, run: _Run, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """z and log_det of a run.

        ======================================  ==========================  =================================
        steps                                   mode                        computed by
        ======================================  ==========================  =================================
        FlowSteps that csrc/run computes        any                         :meth:`_run_described`
        other FlowSteps as they come            "checkpoint", "reversible"  :meth:`_run_steps_recomputing`
        other FlowSteps, or steps in a trace    "store"                     :meth:`_run_steps`
        any modules                             "checkpoint", "reversible"  :meth:`_run_modules_recomputing`
        any modules                             "store"                     :meth:`_run_modules`
        ======================================  ==========================  =================================
        """
        recomputes = run.mode != "store"
        if torch.compiler.is_compiling() and recomputes:
            return call_untraced(ReversibleSequence._run, self, run, x, cond)
        if not run.fused:
            path = self._run_modules_recomputing if recomputes else self._run_modules
        elif is_runnable(x) and (found := self._run_described(run, x, cond)) is not None:
            return found
        else:
            recomputes = recomputes and any(step.couplings for step in run.flow_steps)
            path = self._run_steps_recomputing if recomputes else self._run_steps
        check_runs(not is_dry(x) or not couplings_of(run.flow_steps), self.memory)
        return path(run, x, cond)

    def _run_described(self, run: _Run, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Joined steps by csrc/run; None where it does not compute them."""
        steps = run.flow_steps
        by_step = [step.couplings for step in steps]
        couplings = [coupling for own in by_step for coupling in own]
        if not couplings:
            return None
        found = entered(couplings, maps_of(steps, by_step), x, cond, run.squeeze_first, run.budget)
        if found is None:
            return None
        own, x, cond, squeezes = found
        if run.records:
            z, log_det = run_recorded(own, run.mode, self.control, x, cond, squeezes)
        else:
            z, log_det = run_plain(own, x, cond, squeezes, self._folded.get("maps", lambda: folded_maps(own)))
        z, log_det = _through(map_behind(steps), z, log_det)
        return couplings[-1].leave(z), log_det

    def _run_modules(self, run: _Run, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each module is called; autograd keeps what it will."""
        total = x.new_zeros(x.shape[0])
        for step in run.steps:
            x, step_log_det = step(x) if cond is None else step(x, cond)
            total = total + step_log_det
        return x, total

    def _run_modules_recomputing(self, run: _Run, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Modules are called without autograd, and again in the backward."""
        steps: list[Step] = []
        for k, module in enumerate(run.steps):
            own = getattr(module, "recomputed", None)  # of couplings of interop
            steps.append(ModuleStep(module, f"steps[{k}]") if own is None else own(x))
        return run_steps(steps, self._control(run.mode), x, cond)

    def _run_steps_recomputing(self, run: _Run, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Joined steps, whose nets run in chunks, and again in the backward."""
        steps, couplings = run.flow_steps, couplings_of(run.flow_steps)
        x = functional.squeeze(x) if run.squeeze_first else x
        x, cond = couplings[0].enter(x, cond)
        maps = maps_of(steps, [step.couplings for step in steps], is_runnable(x))
        z, log_det = run_steps(recomputed(couplings, run.budget), self._control(run.mode), x, cond, maps)
        z, log_det = _through(map_behind(steps), z, log_det)
        return couplings[-1].leave(z), log_det

    def _run_steps(self, run: _Run, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Joined steps, of which autograd keeps what it will; without a record nets run in chunks."""
        steps, budget = run.flow_steps, None if torch.is_grad_enabled() or is_watched() else run.budget
        return run_couplings(couplings_of(steps), Recorded(steps), x, cond, run.squeeze_first, budget)

    def _plan(self, x: Tensor, cond: Tensor | None, squeeze_first: bool) -> RunPlan:
        """What a forward that is recorded does, of a run that is not told by its model."""
        budget = self.memory
        if isinstance(budget, str):
            return RunPlan.of_mode(budget, len(self), self.memory_budget)
        return call_untraced(ReversibleSequence._made_plan, self, x, cond, squeeze_first)

    def _made_plan(self, x: Tensor, cond: Tensor | None, squeeze_first: bool) -> RunPlan:
        def forward(twin: ReversibleSequence, inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
            x, cond = inputs
            assert x is not None
            return twin(x, cond, squeeze_first)

        return self._plans.of(self, (x, cond), forward, squeeze_first)[0]

    def _sequences(self) -> list[ReversibleSequence]:
        """The runs that a plan is made for."""
        return [self]

    def _control(self, mode: str) -> DriftControl | None:
        """The drift control of what is inverted; None where states are kept."""
        return self.control if mode == "reversible" else None

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, from the last step to the first."""
        if self.is_fused:
            return self._inverse_fused(z, cond)
        log_det = z.new_zeros(z.shape[0])
        for step in reversed(list(self)):
            z, step_log_det = step.inverse(z) if cond is None else step.inverse(z, cond)  # type: ignore[operator]
            log_det = log_det + step_log_det
        return z, log_det

    def _inverse_fused(self, z: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, budget = self.flow_steps(), self.memory_budget
        couplings = couplings_of(steps)
        check_input("z", z, steps[0].channels, steps[0].actnorm.bias)
        found = None
        if couplings and is_runnable(z) and not self._records(z, cond):
            by_step = [step.couplings for step in steps]
            found = entered(couplings, maps_of(steps, by_step), z, cond, False, budget, backwards=True)
        if found is None:
            whole = torch.is_grad_enabled() or is_watched()
            return run_couplings_inverse(couplings, Recorded(steps), z, cond, None if whole else budget)
        own, z, cond, _ = found
        behind = map_behind(steps)
        if behind is not None:
            matrix, index = behind.inverse()
            z = functional.channel_unmix(z, matrix, behind.offset, index=index)
        inverses = self._folded.get("inverses", lambda: inverted_maps(folded_maps(own)))
        x, log_det = run_inverse(own, z, cond, inverses)
        log_det = log_det if behind is None else log_det - maps_log_det([behind], z)
        return couplings[0].leave(x), log_det

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise step after step from data, each from the output of those before it; returns z."""
        return self._initialize_steps(x, cond, False)

    @torch.no_grad()
    def _initialize_steps(self, x: Tensor, cond: Tensor | None, squeeze_first: bool) -> Tensor:
        if squeeze_first:
            x = functional.squeeze(x)
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
        return own if isinstance(self.memory, str) else self._plans.report([own])[0]

    def get_extra_state(self) -> Tensor:
        """The drift control's state, saved with the weights."""
        return self.control.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue with a saved drift control."""
        self.control.load_state(state)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "_extra_state"
        if key in missing_keys:  # weights saved without it, such as converted ones: the control begins anew
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        """Show the memory mode in the repr."""
        return f"memory={self.memory!r}"
