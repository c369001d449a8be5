"""Steps of a flow whose training memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import can_read, check_input, expect
from pyglow_fast._tracing import is_exporting, is_watched
from pyglow_fast.coupling_nets.net_runner import NetRunner
from pyglow_fast.coupling_nets.plan import budget_bytes
from pyglow_fast.coupling_nets.traits import has_known_modules
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import (
    ChannelMap,
    FlowStep,
    Recorded,
    fold_in_one,
    run_couplings,
    run_couplings_inverse,
    runs_fused,
)
from pyglow_fast.layers.folded import FoldCache
from pyglow_fast.layers.permutation import InvConv, Permute
from pyglow_fast.layers.ranks import refused_alike
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible import Chain, DriftControl, ModuleChain, Pass, run_chain

MEMORY_MODES = ("reversible", "checkpoint", "store")
GRADIENT_SHARE = 4  # of the budget, what gradients may take that exist a second time while they are added to others


def _is_initialized(step: nn.Module) -> bool:
    """Whether nothing in a step waits for data."""
    if type(step) is FlowStep and type(step.permutation) in (InvConv, Permute) and type(step.coupling) is Coupling:
        net = step.coupling.net
        if type(net) is CouplingNet and net.has_own_norms and not step.coupling.has_own_scale:
            return step.is_initialized  # of these all is known, without a look into each module
    return all(getattr(module, "is_initialized", True) for module in step.modules())


def pass_of(control: DriftControl | None, budget: str | int, x: Tensor, step_bytes: Sequence[int]) -> Pass:
    """One forward of steps with so many bytes of parameters, to be recomputed; without a control by checkpointing."""
    limit = budget_bytes(budget, x.device.type) // GRADIENT_SHARE if can_read(x) else None
    return Pass(control, step_bytes, limit)


def run_recomputing(
    runners: Sequence[NetRunner],
    specs: Sequence[CouplingSpec],
    maps: ChannelMap,
    whole: Pass,
    x: Tensor,
    cond: Tensor | None = None,
    squeeze_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """x through K steps, a channel map (stacked: (K, C, C), (K, C), (K,)) and a coupling each, to be recomputed."""
    counts = [part.end - part.first for part in whole.parts]
    matrices, offsets, map_log_dets = (part.split(counts) for part in maps)
    kept = maps.matrix.shape[-1] // 2
    z, total = x, x.new_zeros(x.shape[0])
    for i, part in enumerate(whole.parts):
        own = slice(part.first, part.end)
        chain = Chain(runners[own], specs[own], kept, squeeze_first and part.first == 0, part)
        z, log_det = run_chain(chain, z, cond, matrices[i], offsets[i], map_log_dets[i].sum())
        total = log_det if i == 0 else total + log_det
    return z, total


class ReversibleSequence(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum; what the backward needs is recomputed rather than stored.

    Memory modes, at any time by assigning to ``memory``:

    - "store": ordinary autograd. Memory grows with K and with the nets' hidden layers.
    - "checkpoint": the state of every step is kept, the nets are run again. Exact.
    - "reversible": the output and a few anchors are kept, states are recomputed by inversion: one more run of the net
      a step, as in "checkpoint". What has drifted beyond the tolerance is found and redone by checkpointing, so that
      the gradient is right in any case; the anchors' spacing adapts (see docs/memory.md).

    In the last two, and always without gradients, the coupling nets of FlowSteps run in chunks of samples and rows, so
    that their activations stay within ``memory_budget``. FlowSteps are joined where they are as they come: with methods
    overridden in a subclass, with hooks on them, or among other modules, they run one by one, and their nets whole.

    Args:
        steps: FlowSteps of one width, or any modules with ``forward(x, cond=None) -> (z, log_det)`` and
            ``inverse``; their parameters must be theirs alone and their output a function of the input.
        memory: a mode.
        anchor_every: steps between stored states: "auto", an int, or None for none but the input.
        tolerance: largest relative drift of a recomputed state, or None for the default by dtype and depth.
        memory_budget: bytes of one net's activations, or "auto".
        deferred_check: in mode "reversible" the host does not wait for the verdict on drift. Where a state has drifted,
            the gradients of this run of steps, and of those that the same backward reaches later, are zero; the next
            pass counts it ("skipped" in the report) and puts the anchors closer. For CUDA graphs, in whose capture it
            is always so; else a wait costs one pause of a GPU's stream per backward, and nothing on a CPU.

    Shapes: x, z (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: a wrong option or input; BatchNorm in training mode; a net that uses other tensors that require a
            gradient than its parameters and inputs (in the backward).

    References: Gomez et al. 2017 (reversible backward), Kingma & Dhariwal 2018 (the steps).
    """

    def __init__(
        self,
        steps: Sequence[nn.Module],
        memory: str = "reversible",
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
        self.control = DriftControl(len(steps), anchor_every, tolerance, deferred_check)
        self.memory = memory
        self.memory_budget = memory_budget
        self._cache = FoldCache()

    @property
    def memory(self) -> str:
        """The memory mode."""
        return self._memory

    @memory.setter
    def memory(self, memory: str) -> None:
        expect(memory in MEMORY_MODES, "memory", f"one of {MEMORY_MODES}", repr(memory))
        self._memory = memory

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
        """Whether all are FlowSteps as they come, which run joined."""
        return all(runs_fused(step) for step in self)

    def flow_steps(self) -> list[FlowStep]:
        """The steps, if all are FlowSteps."""
        return [step for step in self if isinstance(step, FlowStep)]

    def forward(self, x: Tensor, cond: Tensor | None = None, squeeze_first: bool = False) -> tuple[Tensor, Tensor]:
        """x -> z. squeeze_first: x (N, C / 2^d, *(2 spatial)) is squeezed, by FlowSteps as it is read."""
        fused = self.is_fused
        if squeeze_first and not fused:
            x, squeeze_first = functional.squeeze(x), False
        if fused and not squeeze_first:
            first = self.flow_steps()[0]
            with refused_alike(first.actnorm.bias.device, lambda: self.training and not self._is_initialized()):
                check_input("x", x, first.channels, first.actnorm.bias)
        if self.training and not self._is_initialized():
            self._initialize_steps(x, cond, squeeze_first)
        records = torch.is_grad_enabled() and (
            x.requires_grad
            or (cond is not None and cond.requires_grad)
            or any(parameter.requires_grad for parameter in self.parameters())
        )
        recomputes = records and self.memory != "store" and not is_exporting()
        if not fused:
            return self._run_modules(x, cond, recomputes)
        steps = self.flow_steps()
        if not recomputes:
            # Without a record the nets run in chunks. A net of the user's may use other tensors that want one.
            whole_nets = records or is_watched()
            if not whole_nets and torch.is_grad_enabled():
                whole_nets = not all(has_known_modules(step) for step in steps)
            couplings = [step.coupling for step in steps]
            if whole_nets:
                return run_couplings(couplings, Recorded(steps), x, cond, squeeze_first)
            return run_couplings(couplings, self._cache.get(steps), x, cond, squeeze_first, self.memory_budget)
        self._cache.clear()
        runners = [step.coupling.runner(self.memory_budget) for step in steps]
        whole = self._pass(x, [sum(parameter.nbytes for parameter in runner.params) for runner in runners])
        specs = [step.coupling.spec for step in steps]
        return run_recomputing(runners, specs, fold_in_one(steps), whole, x, cond, squeeze_first)

    def _pass(self, x: Tensor, step_bytes: Sequence[int]) -> Pass:
        """Of a forward that begins now. A GPU's one verdict a level wants one part."""
        return pass_of(self.control if self.memory == "reversible" else None, self.memory_budget, x, step_bytes)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x."""
        if self.is_fused:
            steps = self.flow_steps()
            check_input("z", z, steps[0].channels, steps[0].actnorm.bias)
            couplings = [step.coupling for step in steps]
            if torch.is_grad_enabled() or is_watched():
                return run_couplings_inverse(couplings, Recorded(steps), z, cond)
            return run_couplings_inverse(couplings, self._cache.get(steps), z, cond, self.memory_budget)
        log_det = z.new_zeros(z.shape[0])
        for step in reversed(list(self)):
            z, step_log_det = step.inverse(z) if cond is None else step.inverse(z, cond)  # type: ignore[operator]
            log_det = log_det + step_log_det
        return z, log_det

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Data-dependent initialisation, step after step, each from the output of those before it; returns z."""
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
        return all(map(_is_initialized, self))

    def _run_modules(self, x: Tensor, cond: Tensor | None, recomputes: bool) -> tuple[Tensor, Tensor]:
        if recomputes:
            return self._run_module_parts(x, cond)
        log_det = x.new_zeros(x.shape[0])
        for step in self:
            x, step_log_det = step(x) if cond is None else step(x, cond)
            log_det = log_det + step_log_det
        return x, log_det

    def _run_module_parts(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        steps, total = list(self), x.new_zeros(x.shape[0])
        step_bytes = [sum(parameter.nbytes for parameter in step.parameters()) for step in steps]
        for part in self._pass(x, step_bytes).parts:
            x, log_det = ModuleChain(steps[part.first : part.end], part).run(x, cond)
            total = total + log_det
        return x, total

    def memory_report(self) -> dict[str, Any]:
        """Mode, spacing, drift and what was redone so far; bytes of the anchors need a shape: see plan_chunks."""
        return {"memory": self.memory, "steps": len(self), **self.control.report()}

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
        """Mode, for repr."""
        return f"memory={self.memory!r}"
