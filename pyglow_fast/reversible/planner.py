"""Which steps keep what, so that training takes least time within a number of bytes: a plan from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.plan import budget_bytes
from pyglow_fast.reversible.costs import RestCost, RunBytes, RunCost, bytes_of, peak
from pyglow_fast.reversible.setting import memory_text

LEAST_CHUNK = 128 * 1024  # bytes of a net's activations that a plan goes down to, by halves, from the automatic budget
Split = tuple[int, int]  # steps before the first are inverted, before the second keep their state, the others all


@dataclass(frozen=True)
class MemoryPlan:
    """What each run of steps does, and what that is predicted to take.

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


class _Search:
    """Plans for runs with one budget of the nets' activations; places are counted as in RunCost.places."""

    def __init__(self, runs: Sequence[RunCost], rest: RestCost, net_budget: str | int) -> None:
        self.runs, self.rest, self.net_budget = runs, rest, net_budget
        self._bytes: dict[tuple[int, int, int], RunBytes] = {}

    def peak(self, splits: Sequence[Split]) -> int:
        return peak([self._bytes_of(i, *split) for i, split in enumerate(splits)], self.rest)

    def _bytes_of(self, run: int, first: int, second: int) -> RunBytes:
        key = run, first, second
        if key not in self._bytes:
            places = self.runs[run].places
            self._bytes[key] = bytes_of(self.runs[run], places[first][1], places[second][1], self.net_budget)
        return self._bytes[key]

    def work(self, splits: Sequence[Split]) -> int:
        """The time of a plan, in multiply-adds."""
        pairs = zip(self.runs, splits, strict=True)
        return sum(run.work(run.places[a][1], run.places[b][1], self.net_budget) for run, (a, b) in pairs)

    def least(self) -> list[Split]:
        """Everything is inverted."""
        return [(len(run.places) - 1,) * 2 for run in self.runs]

    def _rates(self, index: int) -> Iterator[tuple[int, int, bool]]:
        """(time, bytes, whether it is to store) that the first step of a run's end takes less and more."""
        run, last = self.runs[index], len(self.runs[index].places) - 1
        before = (last, last)
        for split, stores in (((last - 1, last), False), ((last - 1, last - 1), True)):
            of = [run.work(run.places[a][1], run.places[b][1], self.net_budget) for a, b in (before, split)]
            size = self._bytes_of(index, *split).kept - self._bytes_of(index, *before).kept
            yield of[0] - of[1], max(size, 1), stores
            before = split

    def moves(self) -> list[tuple[int, bool]]:
        """(run, whether a step is stored, else checkpointed), those that save most time for a byte first.

        Steps of a run are alike, so that a run's moves of a kind stand together; deep runs first where all is equal.
        """
        kinds = [(*rate, index) for index in range(len(self.runs)) for rate in self._rates(index)]
        kinds.sort(key=lambda kind: (-(kind[0] * 2**20 // kind[1]), -kind[3], kind[2]))
        return [(index, stores) for _, _, stores, index in kinds for _ in range(len(self.runs[index].places) - 1)]

    @staticmethod
    def moved(splits: Sequence[Split], moves: Sequence[tuple[int, bool]]) -> list[Split]:
        """One step of a run more checkpointed, or one more stored, by each move."""
        found = list(splits)
        for index, stores in moves:
            a, b = found[index]
            found[index] = (min(a, b - 1), b - 1) if stores and b > 0 else (max(a - 1, 0), b) if not stores else (a, b)
        return found

    def best(self, budget: int) -> list[Split] | None:
        """The plan of least time within a budget; None if there is none."""
        splits = self.least()
        if self.peak(splits) > budget:
            return None
        kinds: list[list[tuple[int, bool]]] = []
        for move in self.moves():
            if kinds and kinds[-1][-1] == move:
                kinds[-1].append(move)
            else:
                kinds.append([move])
        for same in kinds:  # as many of each as fit, the worthiest first
            low, high = 0, len(same)
            while low < high:
                middle = (low + high + 1) // 2
                if self.peak(self.moved(splits, same[:middle])) <= budget:
                    low = middle
                else:
                    high = middle - 1
            splits = self.moved(splits, same[:low])
        return splits


def _net_budgets(given: str | int, device_type: str) -> list[str | int]:
    """What a plan may let the nets' activations take: what the caller says, or from the automatic budget downwards."""
    if given != "auto":
        return [given]
    most = budget_bytes("auto", device_type)
    count = (most // LEAST_CHUNK).bit_length()
    return ["auto", *(most >> i for i in range(1, count))]


def least_net_budget(given: str | int, device_type: str) -> str | int:
    """The least that a plan lets the nets' activations take, for a run whose plan cannot be made yet."""
    return _net_budgets(given, device_type)[-1]


def plan_memory(
    runs: Sequence[RunCost], rest: RestCost, budget: int, net_budget: str | int = "auto", device_type: str = "cpu"
) -> MemoryPlan:
    """The plan of least time whose tensors, beyond parameters and their gradients, take at most ``budget`` bytes.

    A function of its arguments alone: shapes decide, no clock and no free memory, so that it is the same everywhere.

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
    found: list[tuple[int, _Search, list[Split]]] = []
    least: list[tuple[int, str]] = []
    everything = [(0, 0)] * len(runs)
    for own in _net_budgets(net_budget, device_type):
        search = _Search(runs, rest, own)
        if search.peak(everything) <= budget:
            found = [(0, search, everything)]
            break
        splits = search.best(budget)
        least += [(search.peak(search.least()), "inverted"), (search.peak(everything), "stored")]
        if splits is not None:
            found.append((search.work(splits), search, splits))
    if not found:
        size, how = min(least)
        expect(False, "memory", f"at least {size} bytes, with every step {how}", memory_text(budget))
    _, search, splits = min(found, key=lambda plan: plan[0])
    time = search.work(splits) / max(search.work(everything), 1)
    steps = tuple((run.places[a][0], run.places[b][0]) for run, (a, b) in zip(runs, splits, strict=True))
    return MemoryPlan(steps, search.net_budget, search.peak(splits), time)
