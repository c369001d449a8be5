"""Verdicts on drift that the host does not wait for: one flag for a whole backward, read when it is known anyway.

In a CUDA graph nothing can be read while it is captured, and nothing be decided when it is replayed. There, and where
the caller wants no pause of the stream, a flag on the device turns all gradients that follow into zero.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pyglow_fast._core.captures import Later, held, is_capturing, refuse_first_use
from pyglow_fast._core.torch_private import backward_id, call_at_its_end

# Flags of so many backward passes are kept: one that fails does not come to the end, where its flag would be dropped.
REMEMBERED = 16

_flags: dict[int, Tensor] = {}
_flags_lock = threading.Lock()


def drifted_in_this_backward(drifted: Tensor) -> Tensor:
    """Tell whether this run of steps or an earlier one of the same backward has drifted; a scalar tensor.

    What follows a drifted run gets a gradient without that run's part, which would be wrong and not be seen.
    """
    task = backward_id()
    with _flags_lock:
        earlier = _flags.pop(task, None)
        flag = drifted if earlier is None else drifted | earlier.to(drifted.device)
        _flags[task] = flag
        while len(_flags) > REMEMBERED:
            del _flags[min(_flags)]
    if earlier is None:  # the flag is dropped at the end: one in a graph's memory would keep that alive
        call_at_its_end(partial(_forget, task))
    return flag


def accepted(grads: Sequence[Tensor | None], drifted: Tensor | None) -> Sequence[Tensor | None]:
    """Pass gradients on, or zeros where a deferred verdict, if there is one, has found a drifted state.

    Args:
        grads: of a state, of the condition, then of parameters, of which all of a kind are chosen in one launch: they
            become views of one tensor.
        drifted: the verdict, a bool.
    """
    if drifted is None:
        return grads
    found = [None if grad is None else grad.masked_fill(drifted.to(grad.device), 0.0) for grad in grads[:2]]
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads[2:]:
        if grad is not None:
            kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    chosen = {}
    for kind, own in kinds.items():
        flat = torch.cat([grad.flatten() for grad in own]).masked_fill_(drifted.to(kind[0]), 0.0)
        parts = flat.split([grad.numel() for grad in own])
        chosen[kind] = iter([part.view(grad.shape) for part, grad in zip(parts, own, strict=True)])
    return found + [None if grad is None else next(chosen[grad.device, grad.dtype]) for grad in grads[2:]]


def _forget(task: int) -> None:
    with _flags_lock:
        _flags.pop(task, None)


class Verdicts:
    """Counts of what backward passes of one run of steps found, made on the device and copied without a wait.

    Attributes:
        values: passes, those that drifted, those whose gradients were zeroed; of the last one drift, limit and spacing;
            (6,) float64, which the replays of a graph update in place. None before the first pass.
        lock: held while verdicts are noted or taken.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self._known = [0, 0, 0]  # what was taken of the first three
        self._copy: Later | None = None
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Verdicts], tuple[()]]:
        """Copies take nothing that is under way."""
        return Verdicts, ()

    def prepare(self, device: torch.device) -> Tensor:
        """Give the counters on a device; they begin anew on another one than before, which a capture refuses."""
        with self.lock:
            if self.values is None or self.values.device != device:
                refuse_first_use(device, "counters of drift")
                self.values = torch.zeros(6, dtype=torch.float64, device=device)
                self._known, self._copy = [0, 0, 0], None
            return self.values

    def add(self, worst: Tensor, zeroed: Tensor, limit: float, spacing: int) -> None:
        """Count a pass: its worst drift, and whether its gradients were zeroed (by any run's drift)."""
        values = held(self.prepare(worst.device), worst.device)
        with self.lock:
            values[0].add_(1)
            values[1].add_(~(worst <= limit))
            values[2].add_(zeroed)
            values[3].copy_(worst)
            values[4].fill_(limit)
            values[5].fill_(spacing)
            if not is_capturing(worst.device):  # a replay has no host code: the counts are read when someone asks
                self._copy = Later(values)

    def take(self, wait: bool) -> list[tuple[float, float, int, bool, bool]]:
        """Take the verdicts that are known and were not taken yet: drift, limit, spacing, drifted and zeroed of each.

        Of several passes since the last call (replays of a graph) all have the last one's drift, limit and spacing.
        """
        with self.lock:
            if self.values is None or is_capturing(self.values.device):
                return []  # while a graph is captured, values cannot be read, nor copies be asked whether they are done
            found = self.values.tolist() if wait else None if self._copy is None else self._copy.read()
            if found is None:
                return []
            *counts, drift, limit, spacing = found
            passes, trips, zeroed = (int(count) - known for count, known in zip(counts, self._known, strict=True))
            self._known, self._copy = [int(count) for count in counts], None
            return [(drift, limit, int(spacing), i < trips, i < zeroed) for i in range(passes)]
