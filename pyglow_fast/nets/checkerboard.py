"""The checkerboard mask: a coupling's net sees whole images, while the coupling itself has two halves as channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._core.errors import expect
from pyglow_fast.nets.run import condition_for


@dataclass(frozen=True)
class Checkerboard:
    """A checkerboard mask: positions whose indices have a sum of ``parity`` (modulo 2) predict the others.

    With x (N, C, R, *rest) halved to (N, 2 C, R / 2, *rest), kept positions first, a coupling is one of channels: a
    step's kernels, and all that recomputes, run on the halves. The net alone runs on whole images: it gets them with
    zeros at the other positions, and of its output what lies there is taken. A condition goes along as a view
    (N, Cc, R / 2, 2, *rest), so that rows of it are cut as those of a half.

    Reference: Dinh et al. 2017, section 3.4.
    """

    parity: int

    def enter(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Divide x into its halves, and view the condition, of the same positions, by pairs of rows."""
        if x.dim() < 3 or x.shape[2] % 2 == 1:
            expected = "shape (N, C, *spatial) with an even first spatial side (mask='checkerboard')"
            expect(False, "x", expected, f"shape {tuple(x.shape)}")
        if cond is not None:
            condition_for(x, cond)  # refuses another shape or device
        return functional.checkerboard_split(x, self.parity), None if cond is None else cond.unflatten(2, (-1, 2))

    def leave(self, halves: Tensor) -> Tensor:
        """Put halves together to images, which undoes :meth:`enter`."""
        return functional.checkerboard_merge(halves, self.parity)

    def net_inputs(self, kept: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Make what the net sees: the masked images, zero at the other positions, and the condition."""
        masked = functional.checkerboard_merge(kept, self.parity, both=False)
        return masked, None if cond is None else cond.flatten(2, 3)

    def shaped(self, kept: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Make stand-ins for :meth:`net_inputs`, of their shapes, dtypes and devices, to be checked."""
        n, channels, rows, *rest = kept.shape
        return kept.new_empty(()).expand(n, channels, 2 * rows, *rest), None if cond is None else cond.flatten(2, 3)
