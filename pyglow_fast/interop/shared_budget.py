"""Plans bytes that the joined runs of one model share, whose shapes and order are known only after calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from pyglow_fast.layers.planned import REMEMBERED, Plans, counts, predicted
from pyglow_fast.reversible import DriftControl
from pyglow_fast.reversible.costs import JoinCost, RestCost, RunCost
from pyglow_fast.reversible.planner import MemoryPlan, RunPlan, least_net_budget


class Call(NamedTuple):
    """A description of a run's call, given when its forward is recorded.

    Attributes:
        key: equal for calls of equal cost.
        control: the run's drift control, which has its number of steps.
        cost: computes the cost of the run from the spacing of its anchors.
    """

    key: Hashable
    control: DriftControl
    cost: Callable[[int], RunCost]


class SharedBudget:
    """A plan of bytes for runs that are called one after another in a training step and share them.

    A training step begins with the first call, and a new one when a run is called that was called in this one already.
    For each call that a step began with, the budget remembers which runs followed, in which order and with which
    shapes. When such a call comes again, all these runs are planned together, and each does what the plan says, which
    depends on their shapes alone. A run that has not followed before, or not with these shapes, once inverts all its
    steps in the smallest chunks. If one run alone shares the bytes, it is planned at once.

    A copy is for copies of the runs, and has none of the plans.

    Args:
        count: how many runs share the bytes so far.
    """

    def __init__(self, count: int = 0) -> None:
        self._count = count
        self._plans = Plans()
        self._steps: OrderedDict[Hashable, dict[int, Call]] = OrderedDict()  # by the call that they begin with
        self._opening: Hashable = None  # the call that the present step began with
        self._step: dict[int, Call] = {}  # what is known of the present step: its runs in order
        self._called: set[int] = set()  # runs that were called in the present step
        self._whole: MemoryPlan | None = None  # the plan of the runs below, made when the step began
        self._runs: list[int] = []
        self._last: dict[int, tuple[RunPlan, MemoryPlan | None]] = {}  # what each run did, by which plan

    def __reduce__(self) -> tuple[type[SharedBudget], tuple[int]]:
        return type(self), (self._count,)

    def add(self) -> int:
        """Let one more run share the bytes; returns its number."""
        self._count += 1
        return self._count - 1

    def plan(self, run: int, call: Call, budget: int, net_budget: str | int, device: torch.device) -> RunPlan:
        """Plan what a run does in a forward that begins now.

        Args:
            run: the number of the run.
            call: what the run says of its call.
            budget: bytes that all runs may take together.
            net_budget: bytes of one net's activations, or "auto".
            device: where the run computes.

        Raises:
            ValueError: the bytes are too few even if every step of the known runs is inverted.
        """
        begins = not self._called or run in self._called
        opening = (run, call.key, budget, net_budget, device)
        step = self._steps.get(opening, {}) if begins else self._step
        known = self._count == 1 or (run in step and step[run].key == call.key)
        followed = step | {run: call}
        if begins or not known:  # may raise, before anything is noted
            whole = self._of_all(followed, budget, net_budget, device)
            if begins:
                self._begin(opening, followed, whole if known else None)
        self._steps[opening if begins else self._opening] = self._step = followed
        self._called.add(run)
        if known:
            self._last[run] = self._split(run), self._whole
        else:
            steps = call.control.n_steps
            self._last[run] = RunPlan(steps, steps, least_net_budget(net_budget, device.type)), None
        return self._last[run][0]

    def _of_all(self, step: dict[int, Call], budget: int, net_budget: str | int, device: torch.device) -> MemoryPlan:
        """The plan of runs that follow one another."""

        def costs(spacings: Sequence[int]) -> tuple[list[RunCost], RestCost]:
            runs = [call.cost(spacing) for call, spacing in zip(step.values(), spacings, strict=True)]
            return runs, RestCost(0, (JoinCost(0, 0),) * len(runs), ())

        key = tuple((run, call.key) for run, call in step.items())
        controls = [call.control for call in step.values()]
        return self._plans.of(controls, key, costs, budget, net_budget, device.type)

    def _begin(self, opening: Hashable, step: dict[int, Call], whole: MemoryPlan | None) -> None:
        """A step begins, with its plan if it is known."""
        self._opening, self._runs, self._whole = opening, list(step), whole
        self._called = set()
        self._steps[opening] = step
        self._steps.move_to_end(opening)
        while len(self._steps) > REMEMBERED:
            self._steps.popitem(last=False)

    def _split(self, run: int) -> RunPlan:
        """The part of a run in the plan of the present step."""
        assert self._whole is not None  # as the run is known
        return self._whole.runs[self._runs.index(run)]

    def report(self, run: int, n_steps: int) -> dict[str, Any]:
        """Report what a run did in its last recorded forward, and what the plan of all predicted, if there was one."""
        if run not in self._last:
            return {}
        own, whole = self._last[run]
        split = own.states_from, own.stored_from
        return counts(n_steps, split) | ({} if whole is None else predicted(whole))
