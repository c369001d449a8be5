"""The form of a state inside a run: how a state enters it, and how it leaves it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyglow_fast import functional
from pyglow_fast.nets.checkerboard import Checkerboard


class Frame(NamedTuple):
    """How a state enters the form that kernels and couplings take, and how it leaves it.

    The chooser (choice.py) alone enters and leaves; executors see what is inside. States of another kind need another
    ``enter`` and ``leave``, and nothing else of a run.
    """

    squeezes: bool = False  # x (N, C / 2^d, *(2 spatial)) enters squeezed; it leaves so too
    first: Checkerboard | None = None  # halves what enters, as the first coupling wants it; None with channel masks
    last: Checkerboard | None = None  # puts the halves of the last coupling together
    masked: bool = False  # a state is zero where the first channel of the condition is, and the result will be

    def turned(self) -> Frame:
        """Return the frame of the run that goes back."""
        return Frame(self.squeezes, self.last, self.first, self.masked)

    def squeezed(self) -> Frame:
        """Return the frame of states that are squeezed already."""
        return Frame(False, self.first, self.last, self.masked)

    def enter(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bring a state and the condition of its nets into the form that the couplings take."""
        x = functional.squeeze(x) if self.squeezes else x
        return (x, cond) if self.first is None else self.first.enter(x, cond)

    def leave(self, x: Tensor) -> Tensor:
        """Bring a state out of the form that the couplings take."""
        return x if self.last is None else self.last.leave(x)
