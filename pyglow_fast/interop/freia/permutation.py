"""Reads a permutation of channels as it is kept, and its indices if it is a hard one."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import can_read


class Seen(NamedTuple):
    """The tensors of a permutation and its inverse as they were when looked at, and their indices if hard."""

    tensors: list[tuple[weakref.ref[Tensor], int, int]]  # each with the place of its data and its version
    indices: tuple[Tensor, Tensor] | None

    def holds(self, pair: tuple[Tensor, Tensor]) -> bool:
        """Whether these are the tensors that were looked at, as they were.

        What is written through .data has no version. On the CPU the ones of a hard permutation are looked at, C numbers
        of each matrix: while they are where they were, an orthogonal matrix is the same.
        """
        for tensor, (known, place, version) in zip(pair, self.tensors, strict=True):
            if known() is not tensor or tensor.data_ptr() != place or tensor._version != version:
                return False
        if self.indices is None or not can_read(pair[0]):
            return True
        ones = (w.detach().flatten(1).gather(1, i[:, None]) for w, i in zip(pair, self.indices, strict=True))
        return all(bool((one == 1).all()) for one in ones)


def look_at(pair: tuple[Tensor, Tensor]) -> Seen:
    """Look at the whole matrices, which stops a GPU's stream: once for as long as they stay."""
    first, second = (w.detach().flatten(1) for w in pair)
    indices = first.argmax(1), second.argmax(1)
    eye = torch.eye(len(first), dtype=first.dtype, device=first.device)
    hard = torch.equal(first, eye[indices[0]]) and torch.equal(second, eye[indices[1]]) and torch.equal(first, second.T)
    return Seen([(weakref.ref(w), w.data_ptr(), w._version) for w in pair], indices if hard else None)
