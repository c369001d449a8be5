"""A permutation of channels as it is kept, and whether it is a hard one: then its indices."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import can_read
from pyglow_fast.layers.kept_values import KeptValues


class Seen(NamedTuple):
    """The tensors of a permutation and its inverse as they were when looked at, and their indices if hard."""

    tensors: list[tuple[weakref.ref[Tensor], int, int]]  # each with the place of its data and its version
    indices: tuple[Tensor, Tensor] | None
    values: KeptValues | None  # of a hard permutation on the CPU

    def holds(self, pair: tuple[Tensor, Tensor]) -> bool:
        """Whether these are the tensors that were looked at, as they were.

        What is written through .data has no version: on the CPU the values of a hard permutation are compared.
        """
        for tensor, (known, place, version) in zip(pair, self.tensors, strict=True):
            if known() is not tensor or tensor.data_ptr() != place or tensor._version != version:
                return False
        return self.values is None or self.values.same()


def look_at(pair: tuple[Tensor, Tensor]) -> Seen:
    """Look at the whole matrices, which stops a GPU's stream: once for as long as they stay."""
    first, second = (w.detach().flatten(1) for w in pair)
    indices = first.argmax(1), second.argmax(1)
    eye = torch.eye(len(first), dtype=first.dtype, device=first.device)
    hard = torch.equal(first, eye[indices[0]]) and torch.equal(second, eye[indices[1]]) and torch.equal(first, second.T)
    values = KeptValues(pair) if hard and all(map(can_read, pair)) else None
    return Seen([(weakref.ref(w), w.data_ptr(), w._version) for w in pair], indices if hard else None, values)
