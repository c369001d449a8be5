"""Plans of which steps keep what, so that training takes least time within a number of bytes, from shapes alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.plan import budget_bytes
from pyglow_fast.reversible.costs import RestCost, RunCost
from pyglow_fast.reversible.setting import memory_text
from pyglow_fast.reversible.timeline import Course, RunBytes, bytes_of

LEAST_CHUNK = 128 * 1024  # bytes of a net's activations that a plan goes down to, by halves, from the automatic budget
EXCHANGES = 4  # of a plan, at most
FEW_SPLITS = 64  # of all runs: four runs of 4 steps, or three of 5
Split = tuple[int, int]  # steps before the first are inverted, before the second keep their state, the others all


class RunPlan(NamedTuple):
    """How K steps keep what their backward needs: the first ones nothing, then states, the last ones everything.

    Stored steps come last, since the backward frees what they keep before it recomputes the others' nets.
    """

    states_from: int  # steps 0 .. states_from - 1 are inverted
    stored_from: int  # steps states_from .. stored_from - 1 keep their state, those from stored_from on everything
    budget: str | int = "auto"  # bytes of one net's activations

    @classmethod
    def of_mode(cls, mode: str, n_steps: int, budget: str | int) -> RunPlan:
        """Plan all steps in one mode."""
        return cls(n_steps * (mode == "reversible"), n_steps * (mode != "store"), budget)

    def pieces(self, first: int, end: int) -> Iterator[tuple[int, int, str]]:
        """List (first, one past the last, mode) of consecutive steps among first .. end - 1."""
        bounds = [0, self.states_from, self.stored_from, max(end, self.stored_from)]
        for mode, (start, stop) in zip(("reversible", "checkpoint", "store"), pairwise(bounds), strict=True):
            if max(start, first) < min(stop, end):
                yield max(start, first), min(stop, end), mode


@dataclass(frozen=True)
class MemoryPlan:
    """The mode of each step of each run, and the bytes and time that this is predicted to take.

    Attributes:
        splits: of each run.
        net_budget: bytes of one net's activations where it is recomputed, or "auto".
        peak: bytes, the most at one time.
        time: over that of storing everything.
    """

    splits: tuple[Split, ...]
    net_budget: str | int
    peak: int
    time: float

    @property
    def runs(self) -> list[RunPlan]:
        """List the plan of each run."""
        return [RunPlan(*split, self.net_budget) for split in self.splits]


@dataclass(frozen=True)
class _Moves:
    """Moves of one run to one mode: its last steps that are inverted, to be checkpointed or stored.

    Attributes:
        run: which.
        stores: they are stored, not checkpointed.
        count: of the moves.
        saved: time that one saves, in multiply-adds.
        size: bytes that one keeps more.
    """

    run: int
    stores: bool
    count: int
    saved: int
    size: int


def _least_so_far(plans: Sequence[tuple[Any, ...]]) -> list[float]:
    """The least second number of those before each one, so that only what is less is worth its larger first."""
    return list(accumulate((plan[1] for plan in plans[:-1]), min, initial=math.inf))


class _Search:
    """Plans for runs with one budget of the nets' activations; places are counted as in RunCost.places.

    Of few steps the fastest of all plans. Of many a number of moves of each run to each mode, made in an order: from
    those of the most time for a byte on.
    """

    def __init__(self, runs: Sequence[RunCost], rest: RestCost, net_budget: str | int) -> None:
        self.runs, self.net_budget, self._course = runs, net_budget, Course(rest)
        self._bytes: dict[tuple[int, int, int], RunBytes] = {}
        self._known: dict[int, list[tuple[int, int, int, Split]]] = {}
        self.start = self._inverted()
        moves = [one for index in range(len(runs)) for one in self._moves_of(index)]
        moves.sort(key=lambda one: (-(one.saved * 2**20 // one.size), -one.run, one.stores))
        self.moves = moves

    def peak(self, splits: Sequence[Split]) -> int:
        return self._course.peak([self._bytes_of(i, *split) for i, split in enumerate(splits)])

    def _bytes_of(self, run: int, first: int, second: int) -> RunBytes:
        key = run, first, second
        if key not in self._bytes:
            places = self.runs[run].places
            self._bytes[key] = bytes_of(self.runs[run], places[first][1], places[second][1], self.net_budget)
        return self._bytes[key]

    def _work_of(self, run: int, split: Split) -> int:
        places = self.runs[run].places
        return self.runs[run].work(places[split[0]][1], places[split[1]][1], self.net_budget)

    def work(self, splits: Sequence[Split]) -> int:
        """The time of a plan, in multiply-adds."""
        return sum(self._work_of(index, split) for index, split in enumerate(splits))

    def _inverted(self) -> list[Split]:
        """Everything is inverted, but for runs that take less otherwise: of few positions or steps."""
        found = [(len(run.places) - 1,) * 2 for run in self.runs]
        for index, (last, _) in enumerate(found):
            others = [[*found[:index], other, *found[index + 1 :]] for other in ((0, last), (0, 0))]
            found = min([found, *others], key=self.peak)
        return found

    def _moves_of(self, index: int) -> Iterator[_Moves]:
        """Of a run, by what all moves to a mode save and keep together: its steps are alike, nearly."""
        count, before = len(self.runs[index].places) - 1, self.start[index]
        for split, stores in (((0, count), False), ((0, 0), True)):
            if before[stores] == 0:
                continue
            saved = self._work_of(index, before) - self._work_of(index, split)
            size = self._bytes_of(index, *split).kept - self._bytes_of(index, *before).kept
            yield _Moves(index, stores, count, max(saved // count, 1), max(size // count, 1))
            before = split

    def splits(self, counts: Sequence[int]) -> list[Split]:
        """The plan of so many of each of the moves."""
        found = list(self.start)
        for one, count in zip(self.moves, counts, strict=True):
            a, b = found[one.run]
            last = len(self.runs[one.run].places) - 1
            found[one.run] = (min(a, last - count), last - count) if one.stores else (max(a - count, 0), b)
        return found

    def _fits(self, counts: Sequence[int], budget: int) -> bool:
        return self.peak(self.splits(counts)) <= budget

    def _with_most(self, counts: list[int], i: int, budget: int) -> list[int]:
        """A plan that fits, with as many more of one of the moves as do."""
        low, high = counts[i], self.moves[i].count
        while low < high:
            middle = (low + high + 1) // 2
            if self._fits([*counts[:i], middle, *counts[i + 1 :]], budget):
                low = middle
            else:
                high = middle - 1
        return [*counts[:i], low, *counts[i + 1 :]]

    def _filled(self, counts: list[int], budget: int) -> list[int]:
        """A plan that fits, with as many more of each of the moves as do, the worthiest first."""
        for i in range(len(self.moves)):
            counts = self._with_most(counts, i, budget)
        return counts

    def _exchanged(self, counts: list[int], budget: int) -> Iterator[list[int]]:
        """Plans with more of one of the moves, and the fewest less of another so that they fit."""
        spare = budget - self.peak(self.splits(counts))
        waiting = [i for i, one in enumerate(self.moves) if counts[i] < one.count]
        for i, (j, less) in itertools.product(waiting, enumerate(self.moves)):
            more = self.moves[i]
            fewest = max(1, -(-(more.size - spare) // less.size))
            for given in range(fewest, min(counts[j], fewest + 1) + 1 if i != j else 0):
                won = min((spare + given * less.size) // more.size, more.count - counts[i]) * more.saved
                if won <= given * less.saved:
                    continue
                trial = self._with_most([*counts[:j], counts[j] - given, *counts[j + 1 :]], i, budget)
                if trial[i] > counts[i]:
                    yield self._filled(trial, budget)
                    break

    @property
    def _few(self) -> bool:
        """Whether every split of every run can be looked at."""
        return sum(len(run.places) * (len(run.places) + 1) // 2 for run in self.runs) <= FEW_SPLITS

    def best(self, budget: int) -> list[Split] | None:
        """The plan of least time within a budget, of many steps nearly; None if there is none."""
        return self._fastest(budget) if self._few else self._nearly_fastest(budget)

    def least(self) -> int:
        """The least bytes that there is a plan for."""
        if not self._few:
            return self.peak(self.start)
        plans = [(0, 0)]  # bytes that the first runs keep, the most so far
        for index in range(len(self.runs)):
            pairs = [(kept, need) for kept, need, _, _ in self._splits_of(index)]
            further = sorted((own + kept, max(most, own + need)) for own, most in plans for kept, need in pairs)
            plans = [plan for plan, least in zip(further, _least_so_far(further), strict=False) if plan[1] < least]
        return min(max(most, kept + self._course.priors) for kept, most in plans)

    def _splits_of(self, index: int) -> list[tuple[int, int, int, Split]]:
        """(bytes kept, bytes needed, time, split) of a run, without splits that are no better in any than another."""
        if index not in self._known:
            last = len(self.runs[index].places) - 1
            found = []
            for split in [(a, b) for b in range(last + 1) for a in range(b + 1)]:
                own = self._bytes_of(index, *split)
                found.append((own.kept, self._course.need(index, own), self._work_of(index, split), split))
            found.sort()
            better: list[tuple[int, int, int, Split]] = []
            for option in found:
                if not any(other[1] <= option[1] and other[2] <= option[2] for other in better):
                    better.append(option)
            self._known[index] = better
        return self._known[index]

    def _fastest(self, budget: int) -> list[Split] | None:
        """By dynamic programming over the runs: of the first ones the least time by the bytes that they keep."""
        plans: list[tuple[int, int, Any]] = [(0, 0, ())]  # the splits as (those before, the last)
        for index in range(len(self.runs)):
            further = [
                (own + kept, time + work, (before, split))
                for kept, need, work, split in self._splits_of(index)
                for own, time, before in plans
                if own + need <= budget
            ]
            further.sort(key=lambda plan: plan[:2])
            least = _least_so_far(further)
            plans = [plan for plan, other in zip(further, least, strict=False) if plan[1] < other]
        fitting = [plan for plan in plans if plan[0] + self._course.priors <= budget]
        if not fitting:
            return None
        splits, before = [], min(fitting, key=lambda plan: plan[1])[2]
        while before:
            before, split = before
            splits.append(split)
        return splits[::-1]

    def _nearly_fastest(self, budget: int) -> list[Split] | None:
        counts = [0] * len(self.moves)
        if not self._fits(counts, budget):
            return None
        counts = self._filled(counts, budget)
        for _ in range(EXCHANGES):
            found = min([counts, *self._exchanged(counts, budget)], key=lambda own: self.work(self.splits(own)))
            if found is counts:
                break
            counts = found
        return self.splits(counts)


def _net_budgets(given: str | int, device_type: str) -> list[str | int]:
    """What a plan may let the nets' activations take: what the caller says, or from the automatic budget downwards."""
    if given != "auto":
        return [given]
    most = budget_bytes("auto", device_type)
    count = (most // LEAST_CHUNK).bit_length()
    return ["auto", *(most >> i for i in range(1, count))]


def _distinct(runs: Sequence[RunCost], budgets: Sequence[str | int]) -> Iterator[str | int]:
    """Those of the budgets that cut some net otherwise than the one before."""
    nets = list({id(part.net): part.net for run in runs for part in run.couplings}.values())
    before = None
    for budget in budgets:
        cuts = [net.chunk_for(budget) for net in nets]
        if cuts != before:
            yield budget
        before = cuts


def least_net_budget(given: str | int, device_type: str) -> str | int:
    """Choose the least that a plan lets the nets' activations take, for a run whose plan cannot be made yet."""
    return _net_budgets(given, device_type)[-1]


def plan_memory(
    runs: Sequence[RunCost], rest: RestCost, budget: int, net_budget: str | int = "auto", device_type: str = "cpu"
) -> MemoryPlan:
    """Find the plan of least time whose tensors, beyond parameters and their gradients, take at most ``budget`` bytes.

    The plan depends on the arguments alone, on shapes and no clock or free memory, so that it is the same everywhere.

    Args:
        runs: of steps, in the order of the forward.
        rest: what a training step costs beside them.
        budget: bytes.
        net_budget: of one net's activations where it is recomputed; "auto": the plan's choice.
        device_type: of the model, "cpu", "cuda", ...

    Raises:
        ValueError: not even inverting every step with the smallest chunks takes so few, nor, of tiny states, storing
            all; it names the lesser of both.
    """
    everything = [(0, 0)] * len(runs)
    searches: list[_Search] = []
    found: list[tuple[int, _Search, list[Split]]] = []  # of budgets of the nets that differ, the largest first
    for own in _distinct(runs, _net_budgets(net_budget, device_type)):
        searches.append(search := _Search(runs, rest, own))
        splits = everything if search.peak(everything) <= budget else search.best(budget)
        if splits is None:
            continue
        found.append((search.work(splits), search, splits))
        if splits is everything or (len(found) > 1 and found[-1][0] >= found[-2][0]):
            break  # still smaller chunks would take still longer
    if not found:
        expect(False, "memory", f"at least {min(search.least() for search in searches)} bytes", memory_text(budget))
    _, search, splits = min(found, key=lambda plan: plan[0])
    time = search.work(splits) / max(search.work(everything), 1)
    steps = tuple((run.places[a][0], run.places[b][0]) for run, (a, b) in zip(runs, splits, strict=True))
    return MemoryPlan(steps, search.net_budget, search.peak(splits), time)
