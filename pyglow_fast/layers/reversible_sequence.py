"""Steps of a flow whose training memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.errors import check_input, expect
from pyglow_fast._core.tracing import call_untraced, kernels_step_aside
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.flow_step import FlowStep, runs_fused
from pyglow_fast.nets.plan import budget_bytes
from pyglow_fast.nets.traits import check_net
from pyglow_fast.runs import choice
from pyglow_fast.runs.description import Element, Run
from pyglow_fast.runs.drift import DriftControl
from pyglow_fast.runs.planner import RunPlan
from pyglow_fast.runs.plans import Plans
from pyglow_fast.runs.setting import parse_memory


class ReversibleSequence(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum; what the backward needs is recomputed rather than stored.

    Memory modes, at any time by assigning to ``memory``, of ``forward`` and of ``inverse`` alike:

    - "store": ordinary autograd. Memory grows with K and with the nets' hidden layers.
    - "checkpoint": the state of every step is kept, the nets are run again. Exact.
    - "reversible": the output and a few anchors are kept, states are recomputed by inversion, those of an inverse by
      running the steps forward: one more run of the net a step, as in "checkpoint". What has drifted beyond the
      tolerance is found and redone by checkpointing, so that the gradient is right in any case; the anchors' spacing
      adapts, in each direction by its own drift (docs/memory-derivation.md).

    In the last two, and always without gradients, the coupling nets of FlowSteps run in chunks of samples and rows, so
    that their activations stay within ``memory_budget``. FlowSteps are joined where they are as they come: of a
    subclass, or with couplings of one, with hooks on them, or among other modules, they run one by one, and their nets
    whole.

    Within torch.func and forward-mode AD every mode is "store", of torch's own ops: any derivative, and vmap.

    Args:
        steps: FlowSteps of one width and one mask, or any modules with ``forward(x, cond=None) -> (z, log_det)``
            and ``inverse``; if all give z alone, so does the sequence. Steps may share parameters, or be there twice;
            their output is a function of the input.
        memory: a mode; or bytes, as a number or a text such as "4GB": FlowSteps then keep what is fastest within them,
            in either direction; see docs/memory.md. In a model with a budget its plan comes in their place.
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
    planned: RunPlan | None = None  # what the last pass did that kept to a number of bytes

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
            n_states = sum(len(step.couplings) for step in own)
        self.control, self.inverse_control = (
            DriftControl(n_states, anchor_every, tolerance, deferred_check) for _ in range(2)
        )
        self.memory = memory
        self.memory_budget = memory_budget
        self._plans = Plans()

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

    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]

    @property
    def is_fused(self) -> bool:
        """Whether all steps are FlowSteps without hooks or overridden methods, which run joined."""
        return all(map(runs_fused, self._modules.values()))

    def _elements(self) -> list[list[Element]] | None:
        """Read the elements of each step, once a call; None where the steps are called as they are."""
        found = []
        for step in self._modules.values():
            if not runs_fused(step):
                return None
            found.append(step.elements())  # type: ignore[union-attr, operator]
        return found

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
        return states[-1] if log_det is None else (states[-1], log_det)  # type: ignore[return-value]

    def intermediates(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        at: Sequence[int] = (),
        squeeze_first: bool = False,
        *,
        plan: RunPlan | None = None,
    ) -> tuple[list[Tensor], Any]:
        """Map x to the states behind the steps ``at`` and behind the last one, with the log_det of all.

        Gradients flow from each of them, in every memory mode; what is kept for that is these states.

        Args:
            x, cond, squeeze_first, plan: see :meth:`forward`.
            at: numbers of steps, ascending; -1 is not the last one, which is always there.

        Returns:
            len(at) + 1 states z (N, C, *spatial), and log_det (N,), or None of steps that give z alone.
        """
        if at:
            self._check_at(at)
        elements = self._elements()
        if elements is None:
            x, squeeze_first = functional.squeeze(x) if squeeze_first else x, False
        elif not squeeze_first:
            self._check_state("x", x)
        if self.training and not self._is_initialized():
            if self.memory in ("checkpoint", "reversible") if self._records(x, cond) else elements is not None:
                check_net(self)  # a net that is to run in chunks, or again; what is refused must initialise nothing
            self.initialize(functional.squeeze(x) if squeeze_first else x, cond)
        memory: Any = self._memory
        if plan is None and not isinstance(memory, str):
            plan = self._planned(x, cond, squeeze_first)
        states: list[Tensor] = []
        log_dets: list[Tensor | None] = []
        for begin, end in pairwise([0, *[k + 1 for k in at], len(self._modules)]):
            for start, stop, mode in [(begin, end, memory)] if plan is None else plan.runs_between(begin, end):
                squeezes = squeeze_first and start == 0
                x, log_det = self._through(elements, x, cond, start, stop, mode, plan, squeezes)
                log_dets.append(log_det)
            states.append(x)
        return states, _total(log_dets)

    def inverse(self, z: Tensor, cond: Tensor | None = None, *, plan: RunPlan | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, from the last step to the first, with minus the log-det.

        Its backward keeps what that of :meth:`forward` does, by the same modes.

        Args:
            z: (N, C, *spatial).
            cond: of the steps, or None.
            plan: of a model with a budget, whose steps are counted from the last one; None: as ``memory`` says.
        """
        elements, count = self._elements(), len(self._modules)
        if elements is not None:
            self._check_state("z", z)
        memory: Any = self._memory
        if plan is None and not isinstance(memory, str):
            plan = self._planned(z, cond, inverse=True)
        log_dets: list[Tensor | None] = []
        for start, stop, mode in [(0, count, memory)] if plan is None else plan.runs_between(0, count):
            z, log_det = self._through(elements, z, cond, count - stop, count - start, mode, plan, inverse=True)
            log_dets.append(log_det)
        log_det = _total(log_dets)
        return z if log_det is None else (z, log_det)  # type: ignore[return-value]

    def _through(
        self,
        elements: list[list[Element]] | None,
        x: Tensor,
        cond: Tensor | None,
        start: int,
        stop: int,
        mode: str,
        plan: RunPlan | None,
        squeezes: bool = False,
        inverse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Take a state through steps start .. stop - 1, which hold these elements, or None; from the last one back."""
        control = self.control_of(inverse)
        if elements is None:
            return choice.through_modules(self[start:stop], x, cond, mode, control, inverse)
        run = Run.of(chain.from_iterable(elements[start:stop]), squeezes=squeezes)
        return choice.through(
            run.turned() if inverse else run,
            x,
            cond,
            mode=mode,
            budget=self._memory_budget if plan is None else plan.budget,
            control=control,
        )

    def control_of(self, inverse: bool) -> DriftControl:
        """The drift's control of a direction."""
        return self.inverse_control if inverse else self.control

    def _check_state(self, name: str, x: Tensor) -> None:
        first: Any = self._modules["0"]
        check_input(name, x, first.channels, first.actnorm.bias)

    def _check_at(self, at: Sequence[int]) -> None:
        last = len(self) - 1
        whole = isinstance(at, Sequence) and all(type(step) is int for step in at)
        expect(whole, "at", "a sequence of ints", repr(at))
        ascending = all(a < b for a, b in zip([-1, *at], [*at, last], strict=True))
        expect(ascending, "at", f"ascending numbers of steps in 0..{last - 1}", list(at))

    def _records(self, x: Tensor, cond: Tensor | None) -> bool:
        """Tell whether autograd asks for a backward."""
        own = (tensor for module in self.modules() for tensor in module._parameters.values())
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in chain((x, cond), own)
        )

    def _planned(self, x: Tensor, cond: Tensor | None, squeeze_first: bool = False, inverse: bool = False) -> RunPlan:
        """The plan of a pass within a number of bytes, when the model gave none."""
        if not self._records(x, cond) or kernels_step_aside():  # a backward that recomputes is no op of torch's
            return RunPlan(0, 0, self.memory_budget)  # all are stored
        if torch.compiler.is_compiling():
            return call_untraced(ReversibleSequence._planned, self, x, cond, squeeze_first, inverse)

        def forward(twin: ReversibleSequence, inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
            x, cond = inputs
            assert x is not None
            return twin.inverse(x, cond) if inverse else twin(x, cond, squeeze_first)

        self.planned = self._plans.of(self, (x, cond), forward, squeeze_first, inverse=inverse)
        return self.planned

    def _sequences(self) -> list[ReversibleSequence]:
        """The runs that a plan is made for."""
        return [self]

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
        for step in self._modules.values():
            if type(step) is FlowStep:
                if not step.is_initialized:
                    return False
            elif not all(getattr(module, "is_initialized", True) for module in step.modules()):  # type: ignore[union-attr]
                return False
        return True

    def memory_report(self) -> dict[str, Any]:
        """Report mode or budget, spacing of the anchors, drift, and what was redone so far; of inverses too, if any.

        With a budget also how many steps the last recorded pass, of either direction, has "inverted", "checkpointed"
        and "stored", and the "predicted_bytes" of its plan.
        """
        own = {"memory": self.memory, "steps": len(self), **self.control.reports(self.inverse_control)}
        return own if isinstance(self.memory, str) or self.planned is None else own | self.planned.report(len(self))

    def get_extra_state(self) -> Tensor:
        """The state of the drift's control in each direction, (2, n), saved with the weights."""
        return torch.stack([self.control.state(), self.inverse_control.state()])

    def set_extra_state(self, state: Tensor) -> None:
        """Continue with a saved drift control, (2, n), or (n,) of the forward alone."""
        controls = (self.control, self.inverse_control)
        both = isinstance(state, Tensor) and state.dim() == 2 and len(state) == len(controls)
        for control, own in zip(controls, state if both else [state], strict=False):
            control.load_state(own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())  # of weights without it: converted ones
        super()._load_from_state_dict(state_dict, prefix, *args)


def _total(log_dets: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of what stretches of steps give; None of such that give z alone."""
    known = [log_det for log_det in log_dets if log_det is not None]
    if len(known) not in (0, len(log_dets)):
        expect(False, "steps", "a log_det from all of them, or from none", f"{len(known)} stretches with one")
    return functional.summed(known) if known else None
