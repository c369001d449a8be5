"""Plans of which steps keep what, so that training is fastest within a number of bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from pyglow_fast._core.errors import expect
from pyglow_fast.nets.plan import budget_bytes
from pyglow_fast.runs.setting import memory_text

LEAST_CHUNK = 128 * 1024  # bytes of a net's activations that a plan goes down to, by halves, from the automatic budget


class RunPlan(NamedTuple):
    """How steps keep what their backward needs: the first ones nothing, then states, the last ones everything.

    Stored steps come last, since the backward frees what they keep before it recomputes the others' nets.
    """

    states_from: int  # steps 0 .. states_from - 1 are inverted
    stored_from: int  # steps states_from .. stored_from - 1 keep their state, those from stored_from on everything
    budget: str | int = "auto"  # bytes of one net's activations
    peak: int = 0  # bytes, the most at one time that the whole training step is predicted to take; 0: nobody asked

    def cut(self, lengths: Iterable[int]) -> list[RunPlan]:
        """Plan each of the runs of so many steps that follow one another, their steps counted from their own first."""
        found = []
        for first, end in pairwise(accumulate(lengths, initial=0)):
            states_from, stored_from = (min(max(own - first, 0), end - first) for own in self[:2])
            found.append(self._replace(states_from=states_from, stored_from=stored_from))
        return found

    def report(self, n_steps: int) -> dict[str, int]:
        """Count the steps of each kind, for memory reports."""
        counts = {"inverted": self.states_from, "checkpointed": self.stored_from - self.states_from}
        return counts | {"stored": n_steps - self.stored_from, "predicted_bytes": self.peak}

    def runs_between(self, first: int, end: int) -> Iterator[tuple[int, int, str]]:
        """List (first, one past the last, mode) of consecutive steps among first .. end - 1."""
        bounds = [0, self.states_from, self.stored_from, max(end, self.stored_from)]
        for mode, (start, stop) in zip(("reversible", "checkpoint", "store"), pairwise(bounds), strict=True):
            if max(start, first) < min(stop, end):
                yield max(start, first), min(stop, end), mode


def plan_memory(
    bytes_of: Callable[[RunPlan], int], n_steps: int, budget: int, net_budget: str | int, device_type: str
) -> RunPlan:
    """Find a plan of little time whose tensors, beyond parameters and their gradients, take at most ``budget`` bytes.

    Plans are tried in one order: from that which inverts every step, each next one keeps the state of one step more,
    the last ones first, since that saves most time for a byte; behind that which keeps all states each stores one step
    more. Chunks of the nets get smaller than the automatic ones only where not even the first plan fits: one chunk is
    at most what one stored step keeps, so that more could not be won.

    ``bytes_of`` goes through a training step with a plan, and tells the most bytes that it takes at one time;
    ``net_budget`` is of one net's activations where it is recomputed, "auto" for the plan's choice. Too few bytes are
    refused, with how many are enough.
    """

    @cache
    def tried(number: int, chunks: str | int) -> RunPlan:
        plan = RunPlan(max(n_steps - number, 0), min(2 * n_steps - number, n_steps), chunks)
        return plan._replace(peak=bytes_of(plan))

    inverted, checkpointed, stored = 0, n_steps, 2 * n_steps
    # To invert steps of tiny states takes more than to keep these.
    starts = [
        (number, chunks)
        for chunks in _net_budgets(net_budget, device_type)
        for number in (stored, inverted, checkpointed)
    ]
    fitting = (start for start in starts if tried(*start).peak <= budget)
    first = next(fitting, None) or min(starts, key=lambda start: tried(*start).peak)
    least = tried(*first).peak
    expect(least <= budget, "memory", f"at least {least} bytes", memory_text(budget))
    number, chunks = first
    return tried(number + bisect_right(range(number + 1, stored), budget, key=lambda k: tried(k, chunks).peak), chunks)


def _net_budgets(given: str | int, device_type: str) -> list[str | int]:
    """List the budgets that a plan may give the nets: the caller's, or the automatic one and its halves."""
    if given != "auto":
        return [given]
    most = budget_bytes("auto", device_type)
    count = (most // LEAST_CHUNK).bit_length()
    return ["auto", *(most >> i for i in range(1, count))]


class NotCompiledError(Exception):
    """A dry run found steps that csrc/run does not compute; whoever made it calls :func:`refuse_bytes`."""


def refuse_bytes(budget: str | int) -> None:
    """Refuse a number of bytes, where steps are not computed by csrc/run."""
    expected = 'a mode such as "reversible" where the compiled run does not compute all steps'
    expected += " (nets of your own or with a border, hooks, other modules, masks, no extension)"
    expect(False, "memory", expected, memory_text(budget))
