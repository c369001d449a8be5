"""The walk back through a run of steps: which states are recomputed, which are judged, and what is redone."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyglow_fast._captures import is_capturing
from pyglow_fast._errors import can_read
from pyglow_fast.coupling_nets.run import GradientSum
from pyglow_fast.reversible.deferred import drifted_in_this_backward
from pyglow_fast.reversible.parts import Part

Measure = Tensor | tuple[Tensor, ...]
Inverted = tuple[Tensor, Tensor, Tensor]  # the input of the steps, recomputed or true, the gradient of it, the drift


class SegmentedSum:
    """A sum over steps, of which the last segment may still be taken back: two tensors at most."""

    def __init__(self) -> None:
        self.clear()

    def put(self, value: Tensor | None) -> None:
        """Add the value of the next step; None adds nothing."""
        self._segment.add(value)

    def drop_segment(self) -> None:
        """Take back all that was put since :meth:`close`."""
        self._segment = GradientSum()

    def close(self) -> None:
        """Accept all that was put so far."""
        self._total.add(self._segment.result())
        self._segment = GradientSum()

    def result(self) -> Tensor | None:
        """Give the sum, None if nothing was put."""
        self.close()
        return self._total.result()

    def clear(self) -> None:
        """Forget the sum and begin a new one."""
        self._segment, self._total = GradientSum(), GradientSum()


def added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Add two gradients, of which None is none."""
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
        """Recompute step k's input from its output, and the gradient of it, which uses the true input if given."""

    @abc.abstractmethod
    def measure(self, k: int, x: Tensor, anchor: Tensor | None) -> Measure:
        """Measure the relative error of step k's recomputed input, exactly where the true one is given.

        Returned are small tensors: the error itself, or what :meth:`drift` computes it from, for several steps at once.
        """

    def drift(self, first: int, x: Tensor, measures: Sequence[Measure]) -> Tensor:
        """Find the largest of the errors of consecutive steps from ``first`` on; a scalar tensor, NaN if one is.

        x is a state of their shape.
        """
        return torch.stack([error for error in measures if isinstance(error, Tensor)]).amax()

    @abc.abstractmethod
    def redo(self, first: int, last: int, x: Tensor | None, grad: Tensor) -> Tensor:
        """Redo steps first .. last by checkpointing: gives the gradient of the first's input, which is x.

        x is None where the first begins a part without an anchor: it comes from the anchor before, through the parts
        between.
        """

    def run(self, z: Tensor, grad_z: Tensor) -> Tensor:
        """Compute the gradient of the run's input; whatever drifts is redone, so that it is right in any case.

        With deferred verdicts all gradients are then to be passed through :meth:`accepted`.
        """
        control, whole, first = self.part.whole.control, self.part.whole, self.part.first
        assert control is not None  # a pass without one keeps all states
        limit = control.limit(z.dtype, self.lowest)
        if control.deferred or is_capturing(z.device):
            grad_x, worst = self._invert_all(z, grad_z)
            self.drifted = drifted_in_this_backward(~(worst <= limit))
            whole.deferred(first, worst, limit, self.drifted)
            return grad_x
        # On a GPU reading a value stops the stream: there it happens once.
        grad_x = self._judge_each(z, grad_z, limit) if can_read(z) else self._judge_at_the_end(z, grad_z, limit)
        whole.judged(first, self.worst, limit, self.redone)
        return grad_x

    def accepted(self, grad: Tensor | None) -> Tensor | None:
        """Pass a gradient on, or zero where a deferred verdict has found a drifted state."""
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

    def _invert(self, first: int, end: int, true_input: Tensor | None, y: Tensor, grad: Tensor) -> Inverted:
        """Steps end - 1 .. first by inversion, good or bad, from the output y of the last one."""
        measures: list[Measure] = []
        for k in reversed(range(first, end)):
            anchor = true_input if k == first else None
            y, grad = self.invert(k, y, grad, anchor)
            measures.append(self.measure(k, y, anchor))
        return y if true_input is None else true_input, grad, self.drift(first, y, measures[::-1])

    def _judge_each(self, z: Tensor, grad_z: Tensor, limit: float) -> Tensor:
        y, grad = z, grad_z
        for first, end, true_input in self._segments():
            y, found, drift_tensor = self._invert(first, end, true_input, y, grad)
            drift = float(drift_tensor)
            self.worst = drift if drift != drift else max(self.worst, drift)
            if not drift <= limit:
                self.cond_sum.drop_segment()
                found = self._redo(first, end - 1, true_input, grad)
            self.cond_sum.close()
            grad = found
        self.start = y
        return grad

    def _invert_all(self, z: Tensor, grad_z: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient by inversion of every step, good or bad, and the worst drift."""
        y, grad = z, grad_z
        drifts = []
        for first, end, true_input in self._segments():
            y, grad, drift = self._invert(first, end, true_input, y, grad)
            drifts.append(drift)
        self.start = y
        return grad, torch.stack(drifts).amax() if drifts else z.new_zeros(())

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
