"""Parts of a run of steps, each an autograd function of its own, whose drift is judged together.

A function hands out the gradients of all its parameters when it ends. Where they are added to those of an earlier batch
or lie in a process group's buckets, they exist twice until then: those of one part, and not of the whole run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pyglow_fast._captures import is_capturing
from pyglow_fast._dry import device_of
from pyglow_fast.reversible.drift import SKETCHED, DriftControl

# Several backwards may go through one graph at the same time. One lock for all, since torch.compile cannot trace the
# making of one.
_judging = threading.Lock()

LEAST_PART = 2 * 2**20  # bytes of gradients that may exist a second time while they are added to others


def part_limit(x: Tensor, step_bytes: Sequence[int], boundary: int = 0) -> int | None:
    """Choose how many bytes of gradients a part may have, for so many bytes that are kept between two parts.

    Small parts keep much between them, large ones have many gradients at a time: the sum is least where both cost the
    same, with parts of sqrt(boundary sum(step_bytes)). None stands for one part of all steps, as on a GPU, where one
    check of drift covers the whole run. The device alone decides, since a plan is made outside of torch.compile for a
    forward that is traced.
    """
    return max(LEAST_PART, math.isqrt(boundary * sum(step_bytes))) if device_of(x).type == "cpu" else None


def kept_between(state: int, positions: int, keeps_states: bool) -> tuple[int, bool]:
    """Count the bytes that are kept where one part ends and another begins, and whether they are the state itself.

    Otherwise they are a sketch of it. Of a state with few positions a sketch would be no smaller.

    Args:
        state: bytes of one.
        positions: of one.
        keeps_states: of every step.
    """
    few = positions <= SKETCHED
    return (state if few or keeps_states else state // positions * SKETCHED), few


def cut(step_bytes: Sequence[int], places: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Cut steps into parts (first, one past the last) of at most ``limit`` bytes of gradients, if the places allow it.

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
    """One forward of K steps: what it keeps, and what its backward finds, told to the control when all is known.

    Args:
        control: of the drift; None: all states are kept.
        step_bytes: of the parameters, by step.
        limit: bytes of a part's gradients; None: as few parts as can be.
        ends: steps before which a part has to end, ascending; None: parts end at anchors alone, others anywhere.
        knows_starts: the first state of each part is kept.

    Attributes:
        keeps_states: nothing is to be recomputed from its output.
        spacing: of the anchors, now.
        anchors: steps whose input is stored; none with keeps_states.
        parts: of the run, in its order.
    """

    def __init__(
        self,
        control: DriftControl | None,
        step_bytes: Sequence[int],
        limit: int | None,
        ends: Sequence[int] | None = None,
        knows_starts: bool = False,
    ) -> None:
        n_steps = len(step_bytes)
        self.control = control
        self.keeps_states = control is None or control.checkpoints
        self.anchors = [] if control is None or self.keeps_states else [k for k in control.anchors() if k < n_steps]
        self.spacing = n_steps if control is None or self.keeps_states else control.spacing
        anywhere = self.keeps_states or ends is not None
        bounds: list[tuple[int, int]] = []
        for start, end in pairwise([0, *(ends or []), n_steps]):
            places = range(1, end - start) if anywhere else [k - start for k in self.anchors]
            own = [(0, end - start)] if limit is None else cut(step_bytes[start:end], places, limit)
            bounds += [(start + first, start + last) for first, last in own]
        if knows_starts and not self.keeps_states:
            self.anchors = sorted({*self.anchors, *(first for first, _ in bounds[1:])})
        self.parts = [Part(self, index, first, end) for index, (first, end) in enumerate(bounds)]
        self.final: int | None = None
        self._worst: list[float] = []
        self._deferred: list[Tensor] = []
        self._redone = 0
        self._task = -1

    @classmethod
    def of_couplings(
        cls,
        control: DriftControl | None,
        step_bytes: Sequence[int],
        ends: Sequence[int],
        state: int,
        positions: int,
        like: Tensor,
    ) -> Pass:
        """Make the pass of one forward of couplings, cut anywhere and where a group of channel maps ends.

        Args:
            control, step_bytes: as of the constructor.
            ends: one past the last coupling of each group, ascending.
            state: bytes of a state.
            positions: of one.
            like: a tensor of the device.
        """
        boundary, few = kept_between(state, positions, control is None)
        return cls(control, step_bytes, part_limit(like, step_bytes, boundary), ends[:-1], few)

    def joins(self, first: int, x: Tensor, others: Iterable[Tensor | None]) -> None:
        """Note that a part is run on these, in order: a backward ends with the first that has a gradient to give.

        Raises:
            ValueError: a CUDA graph is being captured where the state x is, and no step was run there before.
        """
        if self.control is not None and not self.keeps_states:
            self.control.prepare(x.device)
        if self.final is None and any(tensor is not None and tensor.requires_grad for tensor in (x, *others)):
            self.final = first

    def judged(self, first: int, worst: float, limit: float, redone: int) -> None:
        """Note the worst drift of the part that begins at ``first``, and how many steps it has redone."""
        with _judging:
            self._begin()
            self._worst.append(worst)
            self._redone += redone
            if first != self.final or self.control is None:
                return
            drifts, redone, self._worst, self._redone = self._worst, self._redone, [], 0
        nan = any(drift != drift for drift in drifts)
        self.control.record(float("nan") if nan else max(drifts), limit, redone, self.spacing)

    def deferred(self, first: int, worst: Tensor, limit: float, zeroed: Tensor) -> None:
        """Note a part's worst drift where the host is not to wait for it; ``zeroed``: whether its gradients were."""
        with _judging:
            self._begin()
            self._deferred.append(worst)
            if first != self.final or self.control is None:
                return
            drifts, self._deferred = torch.stack([drift.to(worst.device) for drift in self._deferred]), []
        self.control.defer(drifts.amax(), zeroed, limit, self.spacing)

    def _begin(self) -> None:
        """Forget what an earlier backward found that ended before the final part, as it wanted late gradients alone."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._worst, self._deferred, self._redone = task, [], [], 0

    def checkpointed(self, first: int, device: torch.device) -> None:
        """Note that a part's states were all kept; within a capture nothing has run, and nothing is noted."""
        if first == self.final and self.control is not None and not is_capturing(device):
            self.control.record_checkpointed()


@dataclass(frozen=True)
class Part:
    """Steps first .. end - 1 of a pass; steps are counted from the part's own first one outside of this class."""

    whole: Pass
    index: int
    first: int
    end: int

    @property
    def knows_start(self) -> bool:
        """Whether the input of its first step is kept: else the backward has it from the part behind it, recomputed."""
        # The final part keeps its input: the parts before it have no backward and keep nothing to recompute it from.
        return self.first == 0 or self.whole.keeps_states or self.is_final or self.first in self.whole.anchors

    @property
    def is_last(self) -> bool:
        """Whether the part is the run's last, where a backward begins."""
        return self.index + 1 == len(self.whole.parts)

    @property
    def is_final(self) -> bool:
        """Whether a backward ends with the part."""
        return self.first == self.whole.final

    @property
    def anchors(self) -> list[int]:
        """List the steps whose input is stored, but for the first: see :attr:`knows_start`."""
        return [k - self.first for k in self.whole.anchors if self.first < k < self.end]
