"""Channel maps of a run of steps, folded where they are needed: in the forward, and once more in the backward.

A map is parameter-sized, what autograd would keep of its making several times that; of a thousand steps both are more
than a flow's states. So a run keeps neither, but the tensors that the maps are made of, which are alive anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import functional

MapInverse = tuple[Tensor, Tensor | None]  # M^-1, with an index the scales of a gather


def inverse_of(matrix: Tensor, index: Tensor | None) -> MapInverse:
    """Invert M, of stacked maps all in one batch; of a gather, which has an index, its scales and its index."""
    return (functional.invert_matrix(matrix), None) if index is None else functional.invert_gather(matrix, index)


@dataclass(frozen=True)
class MapGroup:
    """Maps before consecutive couplings that are folded together, and what they are folded from.

    Attributes:
        first, end: those couplings, end one past the last.
        raw: the tensors that the maps are folded from.
        fold: gives, from these, matrices (K, C, C), offsets (K, C), log_dets (K,) and the indices (K, C) or None; where
            there are indices, the matrices are scales of gathers (K, C).
    """

    first: int
    end: int
    raw: Sequence[Tensor]
    fold: Callable[[Sequence[Tensor]], Any]


class FoldedMaps:
    """Matrix, offset and index of each step of a group, and the inverses once they are asked for.

    Args:
        matrices, offsets, log_dets, indices: stacked, see MapGroup.
    """

    def __init__(self, matrices: Tensor, offsets: Tensor, log_dets: Tensor, indices: Tensor | None = None) -> None:
        self.matrices, self.offsets, self.log_dets = matrices.unbind(), offsets.unbind(), log_dets
        self.stacked_offsets = offsets
        self.indices: Sequence[Tensor | None] = [None] * len(offsets) if indices is None else indices.unbind()
        self._stacked = matrices, indices
        self._inverse: MapInverse | None = None

    @classmethod
    def of(cls, group: MapGroup, raw: Sequence[Tensor]) -> FoldedMaps:
        """Fold the maps of a group from the tensors that they are made of, without a record."""
        with torch.no_grad():
            return cls(*group.fold(raw))

    def of_part(self, own: slice) -> MapsOfPart:
        """Take the maps of a part's steps out of the group's."""
        return MapsOfPart(self, own)

    @property
    def inverse(self) -> MapInverse:
        """Invert the matrix of every step, stacked, all in one batch."""
        if self._inverse is None:
            self._inverse = inverse_of(*self._stacked)
        return self._inverse


class MapsOfPart:
    """The maps of a part's steps, taken from a group's and counted from the part's own first one.

    Args:
        maps: of the group.
        own: which of them.
        grads: of the group, (matrix, offset) by map, where gradients are wanted.
    """

    def __init__(self, maps: FoldedMaps, own: slice, grads: list[tuple[Tensor, ...]] | None = None) -> None:
        self._maps, self._own, self._grads = maps, own, grads
        self.matrices, self.offsets, self.indices = maps.matrices[own], maps.offsets[own], maps.indices[own]

    def inverse(self, steps: int | slice) -> MapInverse:
        """The inverse matrix of a step, or those of some, stacked."""
        scales, back = (None if part is None else part[self._own][steps] for part in self._maps.inverse)
        assert scales is not None  # an index alone may be missing
        return scales, back

    def offset(self, steps: slice) -> Tensor:
        """The offsets of some steps, stacked in their order."""
        return self._maps.stacked_offsets[self._own][steps]

    def put(self, k: int, *grads: Tensor) -> None:
        """Note the gradients of matrix and offset of map k."""
        assert self._grads is not None  # else nothing is differentiated
        self._grads[self._own.start + k] = grads


class OpenGroup:
    """A group within a backward: its maps folded again with a record, and the gradients of them as they come."""

    def __init__(self, group: MapGroup, raw: Sequence[Tensor]) -> None:
        self.leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in raw]
        with torch.enable_grad():
            self._recorded = group.fold(self.leaves)
        matrices, offsets, log_dets, *indices = self._recorded
        self.maps = FoldedMaps(matrices.detach(), offsets.detach(), log_dets.detach(), *indices)
        # Placeholders until each is known.
        self.grads: list[tuple[Tensor, ...]] = list(zip(self.maps.matrices, self.maps.offsets, strict=True))

    def of_part(self, own: slice) -> MapsOfPart:
        """Take the maps of a part's steps, and the places where their gradients go."""
        return MapsOfPart(self.maps, own, self.grads)

    def gradients(self, grad_log_det: Tensor) -> list[Tensor | None]:
        """Compute the gradients of the raw tensors; grad_log_det is that of each map's log|det M|, a scalar tensor."""
        matrices, offsets, log_dets = self._recorded[:3]
        found = [*(torch.stack(part) for part in zip(*self.grads, strict=True)), grad_log_det.expand_as(log_dets)]
        pairs = [(out, grad) for out, grad in zip((matrices, offsets, log_dets), found, strict=True)]
        pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
        wanted = [leaf for leaf in self.leaves if leaf.requires_grad]
        if not wanted or not pairs:
            return [None] * len(self.leaves)
        outs, grads = [out for out, _ in pairs], [grad for _, grad in pairs]
        given = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
        return [next(given) if leaf.requires_grad else None for leaf in self.leaves]
