"""Plans of which steps keep what, so that training takes least time within a number of bytes.

Bytes are those of dry runs of the training step (pyglow_fast/_dry.py), times are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.plan import budget_bytes
from pyglow_fast.reversible.setting import memory_text

LEAST_CHUNK = 128 * 1024  # bytes of a net's activations that a plan goes down to, by halves, from the automatic budget
Split = tuple[int, int]  # steps before the first are inverted, before the second keep their state, the others all

# Times in multiply-adds of a net, at the rate that nets have on a CPU: from the table of docs/speed.md, where they give
# for "checkpoint" and "reversible" over "store" 1.30 and 1.31 (a; measured 1.26 and 1.31), 1.26 and 1.32 (b; 1.08 and
# 1.13), 1.29 and 1.33 (c; 1.24 and 1.27), 1.30 and 1.30 (e; 1.32 and 1.33).
STEP_WORK = 32 * 10**6  # of a step besides its net: autograd, Python
INVERTED_STEP_WORK = 16 * 10**6  # what an inverted step takes more, with its check against drift
INVERTED_VALUE_WORK = 5  # and more for each byte of its state
RECOMPUTED_STEP_WORK = 8 * 10**6  # what a step takes more to be recomputed, besides its net
RECOMPUTED_RUN_WORK = 60 * 10**6  # and a run with any such steps, however few: the first step costs 2 to 3 ms (b, c)
STORED_BYTE_WORK = 8  # to write a net's activations to memory, and read them again
GRADIENTS_WORK = 3  # forward and backward of a net over its forward


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

    def runs_between(self, first: int, end: int) -> Iterator[tuple[int, int, str]]:
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


class NetSize(NamedTuple):
    """The size of a step's net on a batch.

    Attributes:
        work: multiply-adds of its forward.
        overlap: positions that its chunks read, over those that they give.
        stored: bytes of activations that a backward needs.
    """

    work: int
    overlap: float
    stored: int


class RunTimes:
    """Estimates of the time of forward and backward of a run, in multiply-adds.

    Args:
        places: steps before which a plan may change the mode, ascending, from 0 to all.
        nets: of the couplings between each place and the next.
        state: bytes of a state.
        inverts: mode "reversible" inverts steps, and does not keep their states too.
    """

    def __init__(self, places: Sequence[int], nets: Sequence[Sequence[NetSize]], state: int, inverts: bool) -> None:
        def summed(of_net: list[list[float]]) -> list[float]:
            return [0.0, *accumulate(map(sum, of_net))]

        more = INVERTED_STEP_WORK + INVERTED_VALUE_WORK * state if inverts else 0
        recomputed = [
            [(GRADIENTS_WORK + 1) * net.work * net.overlap + STEP_WORK + RECOMPUTED_STEP_WORK for net in unit]
            for unit in nets
        ]
        self.places = places
        self._inverted = summed([[time + more for time in unit] for unit in recomputed])
        self._recomputed = summed(recomputed)
        self._stored = summed(
            [[GRADIENTS_WORK * net.work + STORED_BYTE_WORK * net.stored + STEP_WORK for net in unit] for unit in nets]
        )

    @property
    def last(self) -> int:
        """The number of the last place."""
        return len(self.places) - 1

    def of(self, split: Split) -> float:
        """Estimate the time of a split between places."""
        a, b = split
        recomputed = self._inverted[a] + self._recomputed[b] - self._recomputed[a]
        return recomputed + self._stored[-1] - self._stored[b] + (RECOMPUTED_RUN_WORK if b else 0)


class Bytes(NamedTuple):
    """Bytes of a training step: those that each run keeps behind its forward, and the most at any time."""

    kept: Sequence[int]
    most: int


class Rehearsal(Protocol):
    """A training step that can be gone through without values."""

    def times(self, budget: str | int) -> list[RunTimes]:
        """Estimate the times of each run, for a budget of one net's activations."""

    def bytes_of(self, plans: Sequence[RunPlan]) -> Bytes:
        """Go through the step with a plan of each run."""


@dataclass(frozen=True)
class _Moves:
    """Moves of one run to one mode: its last steps that are inverted, to be checkpointed or stored.

    Attributes:
        run: which.
        stores: they are stored, not checkpointed.
        count: of the moves.
        saved: time that one saves.
        size: bytes that one keeps more.
    """

    run: int
    stores: bool
    count: int
    saved: float
    size: float


class _Search:
    """Plans for runs with one budget of the nets' activations; splits are between places, see RunTimes.

    A plan is a number of moves of each run to each mode, made in an order: from those of the most time for a byte on.
    """

    def __init__(self, step: Rehearsal, net_budget: str | int, first: _Search | None) -> None:
        self._step, self.net_budget, self.runs = step, net_budget, step.times(net_budget)
        self._first = first or self  # of the same runs, which keep as much with other chunks
        self.inverted, self.checkpointed, self.stored = (
            [(run.last * inverts, run.last * recomputes) for run in self.runs]
            for inverts, recomputes in ((True, True), (False, True), (False, False))
        )

    @property
    def as_inverted(self) -> tuple[float, int]:
        """Time and bytes of inverting every step."""
        return self.time(self.inverted), self.bytes_of(self.inverted).most

    def plans(self, splits: Sequence[Split]) -> list[RunPlan]:
        pairs = zip(self.runs, splits, strict=True)
        return [RunPlan(run.places[a], run.places[b], self.net_budget) for run, (a, b) in pairs]

    def bytes_of(self, splits: Sequence[Split]) -> Bytes:
        return self._step.bytes_of(self.plans(splits))

    def time(self, splits: Sequence[Split]) -> float:
        return sum(run.of(split) for run, split in zip(self.runs, splits, strict=True))

    def least(self) -> list[Split]:
        """The plan of the least bytes: all is inverted, but runs of few positions or steps that take less otherwise."""
        found = self.inverted
        for i in range(len(self.runs)):
            others = [[*found[:i], uniform[i], *found[i + 1 :]] for uniform in (self.checkpointed, self.stored)]
            found = min([found, *others], key=lambda splits: self.bytes_of(splits).most)
        return found

    @cached_property
    def _kept(self) -> list[Sequence[int]]:
        """The bytes that each run keeps if all is stored, checkpointed and inverted."""
        return [self.bytes_of(splits).kept for splits in (self.stored, self.checkpointed, self.inverted)]

    def _moves(self, start: Sequence[Split]) -> list[_Moves]:
        """Of each run by what all moves to a mode save and keep together: its steps are alike, nearly."""
        kept, found = self._first._kept, []
        for index, run in enumerate(self.runs):
            before = start[index]
            for split, stores in ((self.checkpointed[index], False), (self.stored[index], True)):
                if before[stores] == 0:
                    continue
                size = kept[_mode(split)][index] - kept[_mode(before)][index]
                saved = run.of(before) - run.of(split)
                found.append(_Moves(index, stores, run.last, max(saved, 1) / run.last, max(size, 1) / run.last))
                before = split
        return sorted(found, key=lambda one: (-one.saved / one.size, -one.run, one.stores))

    def _moved(self, start: Sequence[Split], moves: Sequence[_Moves], counts: Sequence[int]) -> list[Split]:
        """The plan of so many of each of the moves."""
        found = list(start)
        for one, count in zip(moves, counts, strict=True):
            a, b = found[one.run]
            last = self.runs[one.run].last
            found[one.run] = (min(a, last - count), last - count) if one.stores else (max(a - count, 0), b)
        return found

    def best(self, start: Sequence[Split], budget: int) -> list[Split] | None:
        """The plan of least time within a budget, nearly, from one of few bytes on; None if that does not fit."""
        spare = budget - self.bytes_of(start).most
        if spare < 0:
            return None
        moves = self._moves(start)
        counts = [0] * len(moves)
        for i, one in enumerate(moves):  # as many of each as fit, the worthiest first
            too_many, guess = one.count + 1, int(spare // one.size)
            while guess > counts[i] and too_many - counts[i] > 1:
                guess = min(guess, too_many - 1)
                left = budget - self.bytes_of(self._moved(start, moves, [*counts[:i], guess, *counts[i + 1 :]])).most
                if left >= 0:
                    counts[i], spare = guess, left
                    guess += max(int(left // one.size), 1)
                else:
                    too_many = guess
                    guess = max(guess + int(left // one.size), counts[i] + 1)
        return self._moved(start, moves, counts)


def _mode(split: Split) -> int:
    """How many of its numbers are not 0: 2 of a run that is all inverted, 0 of one that is all stored."""
    return (split[0] > 0) + (split[1] > 0)


def _net_budgets(given: str | int, device_type: str) -> list[str | int]:
    """What a plan may let the nets' activations take: what the caller says, or from the automatic budget downwards."""
    if given != "auto":
        return [given]
    most = budget_bytes("auto", device_type)
    count = (most // LEAST_CHUNK).bit_length()
    return ["auto", *(most >> i for i in range(1, count))]


def plan_memory(step: Rehearsal, budget: int, net_budget: str | int = "auto", device_type: str = "cpu") -> MemoryPlan:
    """Find the plan of least time whose tensors, beyond parameters and their gradients, take at most ``budget`` bytes.

    The plan depends on the arguments alone, on shapes and no clock or free memory, so that it is the same everywhere.

    Args:
        step: a training step.
        budget: bytes.
        net_budget: of one net's activations where it is recomputed; "auto": the plan's choice.
        device_type: of the model, "cpu", "cuda", ...

    Raises:
        ValueError: not even inverting every step with the smallest chunks takes so few, nor, of tiny states, storing
            all; it names the lesser of both.
    """
    searches: list[_Search] = []  # of budgets of the nets that differ, the largest first
    found: list[tuple[float, _Search, list[Split]]] = []
    for own in _net_budgets(net_budget, device_type):
        search = _Search(step, own, searches[0] if searches else None)
        if not searches and search.bytes_of(search.stored).most <= budget:
            return MemoryPlan(((0, 0),) * len(search.runs), own, search.bytes_of(search.stored).most, 1.0)
        if searches and search.as_inverted == searches[-1].as_inverted:
            continue  # no net is cut otherwise
        searches.append(search)
        if (splits := search.best(search.inverted, budget)) is not None:
            found.append((search.time(splits), search, splits))
            if len(found) > 1 and found[-1][0] >= found[-2][0]:
                break  # still smaller chunks would take still longer
    if not found:
        least, search, splits = min(
            ((one.bytes_of(one.least()).most, one, one.least()) for one in searches), key=lambda plan: plan[0]
        )
        expect(least <= budget, "memory", f"at least {least} bytes", memory_text(budget))
        splits = search.best(splits, budget) or splits
        found.append((search.time(splits), search, splits))
    time, search, splits = min(found, key=lambda plan: plan[0])
    steps = tuple((plan.states_from, plan.stored_from) for plan in search.plans(splits))
    share = time / max(search.time(search.stored), 1)
    return MemoryPlan(steps, search.net_budget, search.bytes_of(splits).most, share)
