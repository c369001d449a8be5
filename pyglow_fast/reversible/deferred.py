"""Verdicts on drift that the host does not wait for: one flag for a whole backward, read when it is known anyway.

In a CUDA graph nothing can be read while it is captured, and nothing be decided when it is replayed. There, and where
the caller wants no pause of the stream, a flag on the device turns all gradients that follow into zero.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._captures import Later, held, is_capturing, refuse_first_use

# Flags of so many backward passes are kept: one that fails does not come to the end, where its flag would be dropped.
REMEMBERED = 16

_flags: OrderedDict[int, Tensor] = OrderedDict()
_flags_lock = threading.Lock()


def drifted_in_this_backward(drifted: Tensor) -> Tensor:
    """Whether this run of steps or one before it in the same backward has drifted; a scalar tensor.

    What follows a drifted run gets a gradient without that run's part, which would be wrong and not be seen.
    """
    task = torch._C._current_graph_task_id()
    with _flags_lock:
        earlier = _flags.pop(task, None)
        flag = drifted if earlier is None else drifted | earlier.to(drifted.device)
        _flags[task] = flag
        while len(_flags) > REMEMBERED:
            _flags.popitem(last=False)
    if earlier is None:  # the flag is dropped at the end: one in a graph's memory would keep that alive
        torch.autograd.Variable._execution_engine.queue_callback(partial(_forget, task))
    return flag


def accepted(grad: Tensor | None, drifted: Tensor | None) -> Tensor | None:
    """Pass a gradient on, or zero where a deferred verdict, if there is one, has found a drifted state."""
    if grad is None or drifted is None:
        return grad
    return torch.where(drifted.to(grad.device), torch.zeros((), dtype=grad.dtype, device=grad.device), grad)


def _forget(task: int) -> None:
    with _flags_lock:
        _flags.pop(task, None)


class Verdict(NamedTuple):
    """Finding of one backward pass on the drift of recomputed states.

    Attributes:
        drift: the worst one.
        limit: the tolerance.
        spacing: of the anchors.
        drifted: whether the drift is beyond the tolerance.
        zeroed: whether the pass's gradients became zero, by any run's drift.
    """

    drift: float
    limit: float
    spacing: int
    drifted: bool
    zeroed: bool


class _Counters:
    """The counts of passes on one device; updated in place, also by the replays of a graph."""

    def __init__(self, device: torch.device) -> None:
        # Passes, those that drifted, those whose gradients were zeroed; of the last one drift, limit and spacing.
        self.values = torch.zeros(6, dtype=torch.float64, device=device)
        self.known = [0, 0, 0]  # what was taken of the first three
        self.copy: Later | None = None

    def take(self, wait: bool) -> list[Verdict]:
        """Gives the verdicts that are known; see :meth:`Verdicts.take`."""
        if is_capturing(self.values.device):
            return []  # while a graph is captured, values cannot be read, nor copies be asked whether they are done
        found = self.values.tolist() if wait else None if self.copy is None else self.copy.read()
        if found is None:
            return []
        *counts, drift, limit, spacing = found
        now = [int(count) for count in counts]
        passes, trips, zeroed = (count - known for count, known in zip(now, self.known, strict=True))
        self.known, self.copy = now, None
        return [Verdict(drift, limit, int(spacing), i < trips, i < zeroed) for i in range(passes)]


class Verdicts:
    """Counts of what backward passes of one run of steps found, made on the device and copied without a wait."""

    def __init__(self) -> None:
        self._counters: dict[torch.device, _Counters] = {}  # for good: a graph writes to what it was captured with
        self._lock = threading.Lock()  # or two threads take the same verdict

    def prepare(self, device: torch.device) -> Tensor:
        """Make the counters of a device, if there are none: the values that passes add to, (6,) float64.

        Raises:
            ValueError: a CUDA graph is being captured, whose replays would begin to count anew.
        """
        with self._lock:
            if device not in self._counters:
                refuse_first_use(device, "counters of drift")
                self._counters[device] = _Counters(device)
            return self._counters[device].values

    def add(self, worst: Tensor, zeroed: Tensor, limit: float, spacing: int) -> None:
        """Count a pass: its worst drift, and whether its gradients were zeroed (by any run's drift)."""
        values = held(self.prepare(worst.device), worst.device)
        with self._lock:
            values[0].add_(1)
            values[1].add_(~(worst <= limit))
            values[2].add_(zeroed)
            values[3].copy_(worst)
            values[4].fill_(limit)
            values[5].fill_(spacing)
            if not is_capturing(worst.device):  # a replay has no host code: the counts are read when someone asks
                self._counters[worst.device].copy = Later(values)

    def zeroed(self, device: torch.device) -> Tensor | None:
        """How many passes' gradients have become zero on a device, counted there; None without counters."""
        found = self._counters.get(device)
        return None if found is None else found.values[2]

    def take(self, wait: bool) -> list[Verdict]:
        """Take the verdicts that are known and were not taken yet.

        Of several passes since the last call (replays of a graph) all have the last one's drift, limit and spacing.
        """
        with self._lock:
            return [verdict for counters in self._counters.values() for verdict in counters.take(wait)]
