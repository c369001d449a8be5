"""Plans of memory for runs of steps, made when a forward first sees shapes that there is no plan for."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.reference import autocast_is_on
from pyglow_fast.reversible import DriftControl
from pyglow_fast.reversible.costs import RestCost, RunCost
from pyglow_fast.reversible.planner import MemoryPlan, Split, plan_memory

REMEMBERED = 16  # plans
Costs = Callable[[Sequence[int]], tuple[list[RunCost], RestCost]]  # from the anchors' spacing of each run


def planned_spacing(control: DriftControl) -> int:
    """The distance between stored states (anchors) that a plan reckons with.

    That is the distance which a drift control begins with, since anchors that move apart take less; or the present one,
    where a drift has moved them closer together.
    """
    return min(control.spacing, control.first_spacing)


def run_key(x: Tensor, couplings: Sequence[Coupling]) -> Hashable:
    """What decides how nets run on a state like x, besides shapes: precisions, autocast, and which parts are known."""
    device_type = x.device.type
    autocast = torch.get_autocast_dtype(device_type) if autocast_is_on(device_type) else None
    nets = tuple((coupling.precision, weakref.ref(coupling.net), coupling.net.training) for coupling in couplings)
    return x.dtype, device_type, autocast, nets


class Plans:
    """The plans of a model or a run of steps, by shapes, and what the last forward did."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, MemoryPlan] = OrderedDict()
        self.last: MemoryPlan | None = None

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        """Copies of a model begin without plans, which are of its own nets."""
        return Plans, ()

    def of(
        self,
        controls: Sequence[DriftControl],
        key: Hashable,
        costs: Costs,
        budget: int,
        net_budget: str | int,
        device_type: str,
    ) -> MemoryPlan:
        """Give the plan of a forward that begins now, made anew for shapes that have none.

        Args:
            controls: of the runs.
            key: tells all that decides the costs.
            costs: of the runs and of the rest.
            budget, net_budget, device_type: as of plan_memory.

        Raises:
            ValueError: no plan takes so few bytes.
        """
        now, first = [planned_spacing(control) for control in controls], [control.first_spacing for control in controls]
        known = (key, budget, net_budget, device_type, tuple(now))
        plan = self._known.get(known)
        if plan is None:
            plan = self._known[known] = self._made(now, first, costs, budget, net_budget, device_type)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self.last = plan
        return plan

    @staticmethod
    def _made(
        now: list[int], first: list[int], costs: Costs, budget: int, net_budget: str | int, device_type: str
    ) -> MemoryPlan:
        try:
            return plan_memory(*costs(now), budget, net_budget, device_type)
        except ValueError:
            if now == first:
                raise
            plan = plan_memory(*costs(first), budget, net_budget, device_type)  # which may raise
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
        told = zip(reports, self.last.splits, strict=True)
        return [report | counts(report["steps"], split) | predicted(self.last) for report, split in told]


def counts(n_steps: int, split: Split) -> dict[str, int]:
    """Count the steps of a run that are inverted, checkpointed and stored, for its report."""
    inverted, stored_from = split
    return {"inverted": inverted, "checkpointed": stored_from - inverted, "stored": n_steps - stored_from}


def predicted(plan: MemoryPlan) -> dict[str, int | float]:
    """What a plan says of all runs together, for the report of each."""
    return {"predicted_bytes": plan.peak, "predicted_time": plan.time}
