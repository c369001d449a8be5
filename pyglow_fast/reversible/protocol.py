"""What the chain knows of a coupling net: how to run it, and how to run it again and differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor


class Chunk(Protocol):
    """A part of a batch that a net gives at a time."""

    @property
    def samples(self) -> slice:
        """Along dimension 0."""

    def outputs(self, y: Tensor) -> Tensor:
        """That part of y (N, C, *spatial), a view."""


class NetRun(Protocol):
    """A coupling net with its parameters passed from outside, x1 the kept half of the state.

    ``memo`` is what a repetition needs besides the arguments: states of random generators, autocast.
    """

    def forward(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """net(x1, cond) without a record, and the memo."""

    def repeat(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor], memo: Any) -> Tensor:
        """The same output again."""

    def backward(
        self,
        x1: Tensor,
        cond: Tensor | None,
        params: Sequence[Tensor],
        memo: Any,
        consume: Callable[[Tensor, Chunk], Tensor],
        needs_cond: bool,
        same_x1: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """Gradients of x1, cond and params; ``consume`` makes a chunk's net output into the gradient of it.

        same_x1: x1 is that of the forward to the bit, and not recomputed by inversion.
        """
