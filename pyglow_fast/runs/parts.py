"""Parts of a run of steps, each an autograd function of its own, whose drift is judged together.

A function hands out the gradients of all its parameters when it ends. Where they are added to those of an earlier batch
or lie in a process group's buckets, they exist twice until then: those of one part, and not of the whole run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.backend import require
from pyglow_fast._core.captures import is_capturing
from pyglow_fast._core.derivatives import backward_key
from pyglow_fast._core.dry import device_of, is_dry
from pyglow_fast._core.errors import can_read
from pyglow_fast._core.torch_private import backward_id
from pyglow_fast.runs.deferred import drifted_in_this_backward
from pyglow_fast.runs.drift import DriftControl

# Several backwards may go through one graph at the same time. One lock for all, since torch.compile cannot trace the
# making of one.
_judging = threading.Lock()

LEAST_PART = 2 * 2**20  # bytes of gradients that may exist a second time while they are added to others


def part_limit(on_cpu: bool, step_bytes: Sequence[int], between: int) -> int | None:
    """Choose how many bytes of gradients a part may have, for so many bytes that are kept between two parts.

    Small parts keep much between them, large ones have many gradients at a time: the sum is least where both cost the
    same, with parts of sqrt(between sum(step_bytes)). None stands for one part of all steps, as on a GPU, where one
    check of drift covers the whole run. The device alone decides, since a plan is made outside of torch.compile for a
    forward that is traced.
    """
    return max(LEAST_PART, math.isqrt(between * sum(step_bytes))) if on_cpu else None


def cut(step_bytes: Sequence[int], map_bytes: int, limit: int | None, at_once: int) -> list[tuple[int, int]]:
    """Cut steps into parts (first, one past the last).

    A part has gradients of at most ``limit`` bytes (None: all steps are one part), and maps of at most ``at_once``.
    """
    count, most = len(step_bytes), max(1, at_once // map_bytes)
    if limit is None or (count <= most and sum(step_bytes) <= limit):
        return [(0, count)]
    found, start, grads = [], 0, 0
    for step, own in enumerate(step_bytes):
        if step > start and (grads + own > limit or step - start >= most):
            found.append((start, step))
            start, grads = step, 0
        grads += own
    return [*found, (start, count)]


class RunPass:
    """One forward of a run as its parts share it: what is kept, and what a backward finds and hands on.

    The drift's ``control`` is told when all is known; without one all states are kept. ``bounds`` of the parts are
    (first, one past the last); with ``knows_starts`` the first state of each part is kept.
    """

    def __init__(
        self, control: DriftControl | None, bounds: Sequence[tuple[int, int]], knows_starts: bool = False
    ) -> None:
        n_steps = bounds[-1][1]
        if control is not None:
            control.begin()
        self.control = control
        self.keeps_states = control is None or control.checkpoints  # nothing is to be recomputed from its output
        # Steps whose input is stored.
        self.anchors = [] if control is None or self.keeps_states else [k for k in control.anchors() if k < n_steps]
        self.spacing = n_steps if control is None or self.keeps_states else control.spacing
        if knows_starts and not self.keeps_states:
            self.anchors = sorted({*self.anchors, *(first for first, _ in bounds[1:])})
        self.parts = [Part(self, index, first, end) for index, (first, end) in enumerate(bounds)]
        self.backward_end: int | None = None
        # By backward (graph task and row) its thread, and the output of the node that is next, recomputed.
        self._states: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self._worst: list[Any] = []
        self._redone, self._task = 0, -1

    def note_inputs(self, first: int, device: torch.device, given: Iterable[Tensor | None]) -> None:
        """Note that a part is run on these, in order: a backward stops at the first part that needs a gradient."""
        if self.control is not None and not self.keeps_states:
            self.control.prepare(device)
        asked = [tensor is not None and tensor.requires_grad for tensor in given]
        if self.backward_end is None and any(asked):
            self.backward_end = first

    def defers(self, state: Tensor) -> bool:
        """Tell whether a backward on such states leaves the verdict for later, since the host is not to wait for it."""
        assert self.control is not None
        return self.control.deferred or is_capturing(state.device)

    def judges(self, state: Tensor) -> Any:
        """Tell when a backward of csrc/run on such states judges drift, as its ``Judged`` has it.

        On a GPU, where to read a value makes the host wait, once of all steps; where it is not to wait, never.
        """
        times = require().Judged
        if self.defers(state):
            return times.later
        reads = can_read(state) or (is_dry(state) and device_of(state).type == "cpu")
        return times.each if reads else times.at_the_end

    def judged(self, part: Part, worst: Tensor | float, limit: float, redone: int) -> Tensor | None:
        """Note the worst drift of a part, a tensor where it is judged later, and how many steps it has redone.

        Returns whether the part's gradients are to become zero, a scalar tensor; None where what drifted was redone, or
        the whole update is left out.
        """
        assert self.control is not None
        drifted = drifted_in_this_backward(~(worst <= limit)) if isinstance(worst, Tensor) else None
        zeroes = None if self.control.leaves_out else drifted
        with _judging:
            task = backward_id()
            if task != self._task:  # an earlier one ended before the final part, as it wanted late gradients alone
                self._task, self._worst, self._redone = task, [], 0
            self._worst.append(worst)
            self._redone += redone
            if not part.ends_backward:
                return zeroes
            found, redone, self._worst, self._redone = self._worst, self._redone, [], 0
        if drifted is None:
            nan_or_largest = max(found, key=lambda drift: (drift != drift, drift))
            self.control.record(nan_or_largest, limit, redone, self.spacing)
        else:
            drifts = torch.stack([drift.to(drifted.device) for drift in found])
            self.control.verdicts.add(drifts.amax(), drifted, limit, self.spacing)
        return zeroes

    def checkpointed(self, part: Part, device: torch.device) -> None:
        """Note that a part's states were all kept; within a capture nothing has run, and nothing is noted."""
        if part.ends_backward and self.control is not None and not is_capturing(device):
            self.control.record_checkpointed()

    def take_state(self, part: Part) -> Tensor | None:
        """Take the state that the node behind has left for this backward; None at the last node."""
        key, own = backward_key(), threading.get_ident()
        if part.begins_backward:  # forget what a backward has left that failed, or wanted late gradients alone
            for other, (thread, _) in list(self._states.items()):
                if thread == own and other[0] != key[0]:
                    self._states.pop(other, None)
            return None
        return self._states.pop(key)[1]

    def leave_state(self, part: Part, state: Tensor) -> None:
        """Leave the node's input for the node before, if there is one to come."""
        if not part.ends_backward:
            self._states[backward_key()] = threading.get_ident(), state


@dataclass(frozen=True)
class Part:
    """Steps first .. end - 1 of a run; steps are counted from the part's own first one outside of this class."""

    run_pass: RunPass
    index: int
    first: int
    end: int

    @property
    def knows_start(self) -> bool:
        """Whether the part keeps its input; else the part behind it recomputes this input in the backward."""
        # The final part keeps its input: the parts before it have no backward and keep nothing to recompute it from.
        return (
            self.first == 0 or self.run_pass.keeps_states or self.ends_backward or self.first in self.run_pass.anchors
        )

    @property
    def begins_backward(self) -> bool:
        """Whether the part is the run's last, where a backward begins."""
        return self.index + 1 == len(self.run_pass.parts)

    @property
    def ends_backward(self) -> bool:
        """Whether a backward ends with the part."""
        return self.first == self.run_pass.backward_end

    @property
    def anchors(self) -> list[int]:
        """List the steps whose input is stored, but for the first: see :attr:`knows_start`."""
        return [k - self.first for k in self.run_pass.anchors if self.first < k < self.end]
