"""The walk back through a run of steps: which states are recomputed, which are judged, and what is redone."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyglow_fast._errors import can_read
from pyglow_fast.reversible.deferred import drifted_in_this_backward, is_capturing
from pyglow_fast.reversible.parts import Part


class SegmentedSum:
    """A sum over steps, of which the last step or the last segment may still be taken back: two tensors at most."""

    def __init__(self) -> None:
        self._step: Tensor | None = None
        self._segment: Tensor | None = None
        self._total: Tensor | None = None

    def put(self, value: Tensor | None) -> None:
        """The next step's; with it the one before is accepted."""
        self._segment, self._step = added(self._segment, self._step), value

    def drop_step(self) -> None:
        """Take back the last step's."""
        self._step = None

    def drop_segment(self) -> None:
        """Take back all since :meth:`close`."""
        self._step = self._segment = None

    def close(self) -> None:
        """Accept all."""
        self.put(None)
        self._total, self._segment = added(self._total, self._segment), None

    def result(self) -> Tensor | None:
        """The sum, None if nothing was put."""
        self.close()
        return self._total

    def clear(self) -> None:
        """Begin anew."""
        self._step = self._segment = self._total = None


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, of which None is none."""
    return other if one is None else (one if other is None else one + other)


class Walk(abc.ABC):
    """One backward pass over a part's K steps whose inputs are recomputed, but for those of anchors.

    Gradients of a step's own tensors are kept by step in the subclasses: a step that is redone overwrites its own.
    That of the condition, which is the sum over all steps, is put into ``cond_sum`` by every step as it is done.
    """

    def __init__(
        self,
        n_steps: int,
        x: Tensor | None,
        anchors: Mapping[int, Tensor],
        part: Part,
        lowest: torch.dtype,
    ) -> None:
        self.n_steps, self.anchors, self.part = n_steps, anchors, part
        self.x = x  # the input of the first; None: not known, to be recomputed
        self.start: Tensor | None = None  # the same when the walk is done, recomputed or not
        self.lowest = lowest  # the dtype that the nets compute in
        self.drifted: Tensor | None = None  # a verdict that the host does not know
        self.cond_sum = SegmentedSum()
        self.worst = 0.0
        self.redone = 0

    @abc.abstractmethod
    def invert(self, k: int, y: Tensor, grad_y: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        """From step k's output: its input, recomputed, and the gradient of it, which uses the true input if given."""

    @abc.abstractmethod
    def drift(self, k: int, x: Tensor, anchor: Tensor | None) -> Tensor:
        """The relative error of step k's recomputed input: exact if the true one is given, else by what was seen."""

    @abc.abstractmethod
    def redo(self, first: int, last: int, x: Tensor | None, grad: Tensor) -> Tensor:
        """Steps first .. last by checkpointing: the gradient of the first's input, which is x.

        x is None where the first begins a part without an anchor: it comes from the anchor before, through the parts
        between.
        """

    def run(self, z: Tensor, grad_z: Tensor) -> Tensor:
        """The gradient of the run's input; whatever drifts is redone, so that it is right in any case.

        With deferred verdicts all gradients are then to be passed through :meth:`accepted`.
        """
        control, whole, first = self.part.whole.control, self.part.whole, self.part.first
        assert control is not None  # a pass without one keeps all states
        limit = control.limit(z.dtype, self.lowest)
        if control.deferred or is_capturing(z):
            grad_x, worst = self._invert_all(z, grad_z)
            self.drifted = drifted_in_this_backward(~(worst <= limit))
            whole.deferred(first, worst, limit, self.drifted)
            return grad_x
        # On a GPU reading a value stops the stream: there it happens once.
        grad_x = self._judge_each(z, grad_z, limit) if can_read(z) else self._judge_at_the_end(z, grad_z, limit)
        whole.judged(first, self.worst, limit, self.redone)
        return grad_x

    def accepted(self, grad: Tensor | None) -> Tensor | None:
        """A gradient, or zero where a deferred verdict has found a drifted state."""
        if grad is None or self.drifted is None:
            return grad
        return torch.where(self.drifted.to(grad.device), torch.zeros((), dtype=grad.dtype, device=grad.device), grad)

    def _segments(self) -> Sequence[tuple[int, int, Tensor | None]]:
        """(first step, one past the last, the true input of the first or None), last segment first."""
        starts = [0, *sorted(self.anchors)]
        ends = [*starts[1:], self.n_steps]
        bounds = [(a, b) for a, b in zip(starts, ends, strict=True) if a < self.n_steps]
        return [(a, b, self.x if a == 0 else self.anchors[a]) for a, b in bounds][::-1]

    def _redo(self, first: int, last: int, x: Tensor | None, grad: Tensor) -> Tensor:
        self.redone += last + 1 - first
        return self.redo(first, last, x, grad)

    def _judge_each(self, z: Tensor, grad_z: Tensor, limit: float) -> Tensor:
        y, grad = z, grad_z
        for first, end, true_input in self._segments():
            grad_end = grad
            for k in reversed(range(first, end)):
                anchor = true_input if k == first else None
                x, grad_before = self.invert(k, y, grad, anchor)
                drift = float(self.drift(k, x, anchor))
                self.worst = drift if drift != drift else max(self.worst, drift)
                if not drift <= limit:
                    # The later steps were within bounds, unless only the measure of the first one tells otherwise.
                    last, given = (end - 1, grad_end) if k == first else (k, grad)
                    self.cond_sum.drop_segment() if k == first else self.cond_sum.drop_step()
                    grad = self._redo(first, last, true_input, given)
                    break
                y, grad = x, grad_before
            self.cond_sum.close()
            y = y if true_input is None else true_input
        self.start = y
        return grad

    def _invert_all(self, z: Tensor, grad_z: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient by inversion of every step, good or bad, and the worst drift."""
        y, grad = z, grad_z
        drifts = []
        for first, end, true_input in self._segments():
            for k in reversed(range(first, end)):
                anchor = true_input if k == first else None
                y, grad = self.invert(k, y, grad, anchor)
                drifts.append(self.drift(k, y, anchor))
            y = y if true_input is None else true_input
        self.start = y
        return grad, torch.stack(drifts).amax()

    def _judge_at_the_end(self, z: Tensor, grad_z: Tensor, limit: float) -> Tensor:
        grad, worst = self._invert_all(z, grad_z)
        self.worst = float(worst)
        if self.worst <= limit:
            return grad
        grad = grad_z
        self.cond_sum.clear()
        for first, end, true_input in self._segments():
            grad = self._redo(first, end - 1, true_input, grad)
        return grad
