"""Verdicts on drift that the host does not wait for: one flag for a whole backward, read when it is known anyway.

In a CUDA graph nothing can be read while it is captured, and nothing be decided when it is replayed. There, and where
the caller wants no pause of the stream, a flag on the device turns all gradients that follow into zero.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch
from torch import Tensor

REMEMBERED = 16  # backward passes at a time, of all threads


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured where x is."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
    return flag


class Verdicts:
    """Of backward passes of one run of steps: counted on the device, copied to the host without a wait."""

    def __init__(self) -> None:
        # Passes, those that drifted, those whose gradients were zeroed, last drift; updated in place, also by a graph.
        self._counts: Tensor | None = None
        self._known = [0, 0, 0]  # what was taken of the first three
        self.limit, self.spacing = 0.0, 1  # of the last pass
        self._copy: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def add(self, worst: Tensor, zeroed: Tensor, limit: float, spacing: int) -> None:
        """After a pass: its worst drift, and whether its gradients were zeroed (by any run's drift)."""
        if self._counts is None or self._counts.device != worst.device:
            self._counts, self._known = worst.new_zeros(4, dtype=torch.float64), [0, 0, 0]
        self._counts[0] += 1
        self._counts[1] += ~(worst <= limit)
        self._counts[2] += zeroed
        self._counts[3] = worst
        self.limit, self.spacing = limit, spacing
        if is_capturing(worst):
            return  # a replay has no host code: the counts are read when someone asks
        if worst.device.type == "cuda":
            self._copy = torch.empty(4, dtype=torch.float64, pin_memory=True)
            self._copy.copy_(self._counts, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = self._counts.clone()

    def take(self, wait: bool) -> list[tuple[float, bool, bool]]:
        """(drift, drifted, zeroed) of passes that are known and were not taken yet.

        Of several passes since the last call (replays of a graph) all have the last one's drift.
        """
        if wait and self._counts is not None and not is_capturing(self._counts):
            *counts, drift = self._counts.tolist()
        elif self._copy is None or not (self._event is None or self._event.query()):
            return []
        else:
            *counts, drift = self._copy.tolist()
        now = [int(count) for count in counts]
        passes, trips, zeroed = (count - known for count, known in zip(now, self._known, strict=True))
        self._known, self._copy, self._event = now, None, None
        return [(drift, i < trips, i < zeroed) for i in range(passes)]
