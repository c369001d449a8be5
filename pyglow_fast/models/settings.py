"""Settings that may be changed of a Glow at any time: how its training keeps memory, and the precision of its nets."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._errors import check_count, expect
from pyglow_fast._float32 import CONVOLUTIONS, has_tf32, rounds
from pyglow_fast._tracing import kernels_step_aside
from pyglow_fast.coupling_nets.precision import HALF, check_precision, overridden
from pyglow_fast.layers import Coupling, ReversibleSequence
from pyglow_fast.layers.planned import Plans, planned_spacing, run_key
from pyglow_fast.reversible.costs import RestCost, RunCost
from pyglow_fast.reversible.limits import call_untraced
from pyglow_fast.reversible.planner import MemoryPlan, RunPlan, plan_memory
from pyglow_fast.reversible.setting import parse_memory

# The largest error of decode(encode(x)), as a part of the range of x, by the precision of the nets. Measured with 8
# images of 3x32x32, nets of 64 channels, L = 3, K = 8, trained 150 steps.
ROUND_TRIP_ERROR: dict[object, str] = {torch.bfloat16: "1e-3", torch.float16: "2e-4", "TF32": "1e-4"}


class GlowSettings(nn.Module):
    """The base class of :class:`~pyglow_fast.Glow` that holds memory mode and precision of all its levels."""

    levels: nn.ModuleList
    _plans: Plans

    def _parameter(self) -> Tensor:
        raise NotImplementedError

    def _sequences(self) -> list[ReversibleSequence]:
        """All runs of steps, in their order; none of a frozen model."""
        return [run for level in self.levels for run in level.children() if isinstance(run, ReversibleSequence)]

    @property
    def memory(self) -> str | int:
        """The memory mode of all levels, or the bytes of the whole model; "frozen" for a frozen model."""
        return self._sequences()[0].memory if self._sequences() else "frozen"

    @memory.setter
    def memory(self, memory: str | int | float) -> None:
        expect(bool(self._sequences()), "memory", "a model that is not frozen", memory)
        found = parse_memory(memory)
        for sequence in self._sequences():
            sequence.memory = found

    def _costs(
        self, samples: int, spacings: Sequence[int], conds: Sequence[Sequence[int] | None] | None
    ) -> tuple[list[RunCost], RestCost]:
        """What a training step costs, with anchors so far apart in each run and conditions of such shapes."""
        raise NotImplementedError

    def memory_plan(self, n: int) -> MemoryPlan | None:
        """Plan a training step on n images of the model's size, from shapes alone; None without a budget.

        What the nets run in is reckoned as it would be now: within torch.autocast call it there.

        Args:
            n: images of a batch.

        Raises:
            ValueError: the budget is too small for them; the message says how many bytes are enough.
        """
        check_count("n", n)
        budget, sequences = self.memory, self._sequences()
        if isinstance(budget, str):
            return None
        costs = self._costs(n, [planned_spacing(sequence.control) for sequence in sequences], None)
        return plan_memory(*costs, budget, sequences[0].memory_budget, self._parameter().device.type)

    def _run_plans(self, x: Tensor, conds: Sequence[Tensor | None]) -> list[list[RunPlan]] | None:
        """With a budget, what each level's runs of steps do in a forward that is recorded; else None."""
        if isinstance(self.memory, str) or not torch.is_grad_enabled() or kernels_step_aside():
            return None
        return call_untraced(GlowSettings._made_plans, self, self.memory, x, conds)

    def _made_plans(self, budget: int, x: Tensor, conds: Sequence[Tensor | None]) -> list[list[RunPlan]] | None:
        sequences = self._sequences()
        wants = [parameter.requires_grad for parameter in self.parameters()]
        if not (any(wants) or x.requires_grad or any(cond is not None and cond.requires_grad for cond in conds)):
            return None
        conditions = tuple(None if cond is None else cond.shape for cond in conds)
        key = (x.shape, conditions, tuple(wants), run_key(x, self._couplings()))
        plan = self._plans.of(
            [sequence.control for sequence in sequences],
            key,
            lambda spacings: self._costs(x.shape[0], spacings, conditions),
            budget,
            sequences[0].memory_budget,
            x.device.type,
        )
        parts = iter(plan.runs)
        return [[next(parts) for run in level.children() if run in sequences] for level in self.levels]

    def _couplings(self) -> list[Coupling]:
        return [module for module in self.modules() if isinstance(module, Coupling)]

    @property
    def precision(self) -> str:
        """The precision that all coupling nets compute in."""
        return self._couplings()[0].precision

    @precision.setter
    def precision(self, precision: str) -> None:
        for coupling in self._couplings():
            coupling.precision = precision

    @contextlib.contextmanager
    def _exact(self, precision: str, what: str) -> Iterator[None]:
        """Nets in the precision that a call asks for, with a warning if that is not a full one."""
        check_precision(precision)
        found, like = (self.precision if precision == "auto" else precision), self._parameter()
        autocast = torch.is_autocast_enabled(like.device.type)
        coarse: object = HALF.get(found)
        if found == "auto" and autocast:
            coarse = torch.get_autocast_dtype(like.device.type)
        elif has_tf32(like) and (found == "tf32" or (found == "auto" and rounds(CONVOLUTIONS, like))):
            coarse = "TF32"
        if coarse in ROUND_TRIP_ERROR:
            warnings.warn(
                f"{what} with nets in {coarse}: decode(encode(x)) is off by about {ROUND_TRIP_ERROR[coarse]} of the "
                'range of x, by more the deeper and longer trained the model is; precision="fp32" repeats it to 1e-6',
                stacklevel=4,
            )
        settings = {coupling.precision for coupling in self._couplings()}
        plain = precision == "fp32" and settings == {"auto"} and not has_tf32(like) and not autocast
        same = plain or settings <= {precision}
        with contextlib.nullcontext() if same or precision == "auto" else overridden(precision):
            yield

    def memory_report(self) -> list[dict[str, Any]]:
        """Report on each run of steps, two a level with checkerboards: see ReversibleSequence.memory_report.

        With a budget each also says what the last training step's plan was: how many of its steps are "stored",
        "checkpointed" and "inverted", and of all runs together "predicted_bytes" and "predicted_time" over that of
        mode "store".
        """
        reports = [sequence.memory_report() for sequence in self._sequences()]
        return reports if isinstance(self.memory, str) else self._plans.report(reports)
