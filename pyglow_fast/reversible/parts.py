"""A run of steps cut into parts, each an autograd function of its own, that are judged as one.

A function hands out the gradients of all its parameters when it ends. Where they are added to those of an earlier batch
or lie in a process group's buckets, they exist twice until then: those of one part, and not of the whole run. Cuts lie
at anchors, where the state is stored anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast.reversible.drift import DriftControl


def cut(step_bytes: Sequence[int], places: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """(first, one past the last) of parts whose gradients take at most ``limit`` bytes, if the places allow it.

    Args:
        step_bytes: of the parameters, by step.
        places: steps before which a cut may lie, ascending, not 0.
        limit: bytes.
    """
    parts, start, end = [], 0, 0
    for place in [*places, len(step_bytes)]:
        if end > start and sum(step_bytes[start:place]) > limit:
            parts.append((start, end))
            start = end
        end = place
    return [*parts, (start, end)]


class Pass:
    """One forward of K steps: what it keeps, and what its backward finds, told to the control when all of it is known.

    Args:
        control: of the drift; None: all states are kept.
        step_bytes: of the parameters, by step.
        limit: bytes of a part's gradients; None: one part.

    Attributes:
        keeps_states: nothing is to be recomputed from its output.
        spacing: of the anchors, now.
        anchors: steps whose input is stored; none with keeps_states.
    """

    def __init__(self, control: DriftControl | None, step_bytes: Sequence[int], limit: int | None) -> None:
        n_steps = len(step_bytes)
        self.control = control
        self.keeps_states = control is None or control.checkpoints
        self.anchors = [] if control is None or self.keeps_states else [k for k in control.anchors() if k < n_steps]
        self.spacing = n_steps if control is None or self.keeps_states else control.spacing
        places = range(1, n_steps) if self.keeps_states else self.anchors
        bounds = [(0, n_steps)] if limit is None else cut(step_bytes, places, limit)
        self.parts = [Part(self, first, end) for first, end in bounds]
        self._final: int | None = None
        self._worst: list[float] = []
        self._deferred: list[Tensor] = []
        self._redone = 0
        self._task = -1

    def joins(self, first: int, inputs: Iterable[Tensor | None]) -> None:
        """A part is run on these, in order: a backward ends with the first one that has a gradient to give."""
        if self._final is None and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            self._final = first

    def judged(self, first: int, worst: float, limit: float, redone: int) -> None:
        """Of the part that begins there: its worst drift, and how many steps it has redone."""
        self._begin()
        self._worst.append(worst)
        self._redone += redone
        if first == self._final and self.control is not None:
            drifts, redone, self._worst, self._redone = self._worst, self._redone, [], 0
            nan = any(drift != drift for drift in drifts)
            self.control.record(float("nan") if nan else max(drifts), limit, redone, self.spacing)

    def deferred(self, first: int, worst: Tensor, limit: float, zeroed: Tensor) -> None:
        """The same where the host is not to wait for a value; ``zeroed``: whether its gradients were."""
        self._begin()
        self._deferred.append(worst)
        if first == self._final and self.control is not None:
            drifts, self._deferred = torch.stack([drift.to(worst.device) for drift in self._deferred]), []
            self.control.defer(drifts.amax(), zeroed, limit, self.spacing)

    def _begin(self) -> None:
        """Forget what an earlier backward found that ended before the final part, as it wanted late gradients alone."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._worst, self._deferred, self._redone = task, [], [], 0

    def checkpointed(self, first: int) -> None:
        """Of a part whose states were all kept."""
        if first == self._final and self.control is not None:
            self.control.record_checkpointed()


@dataclass(frozen=True)
class Part:
    """Steps first .. end - 1 of a pass; steps are counted from the part's own first one outside of this class."""

    whole: Pass
    first: int
    end: int

    @property
    def anchors(self) -> list[int]:
        """The steps whose input is stored, but for the first: that is the part's input."""
        return [k - self.first for k in self.whole.anchors if self.first < k < self.end]
