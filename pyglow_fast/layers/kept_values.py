"""Tells whether tensors are what they were, for what was made of them then and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pyglow_fast._backend import extension
from pyglow_fast._errors import can_read
from pyglow_fast._tracing import is_watched

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_LARGE = 4096  # elements: the others are gathered and compared in one go


def _compared(tensors: Sequence[Tensor], live: Sequence[Tensor]) -> list[Tensor]:
    """The bits of tensors, without those that one of ``live`` is a view of."""
    times = Counter(tensor.data_ptr() for tensor in tensors)
    shared = {(one.data_ptr(), one.shape, one.stride(), one.dtype) for one in live if times[one.data_ptr()] == 1}
    bits: list[Tensor] = []
    for tensor in tensors:
        if (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) not in shared:
            bits.append(tensor.detach().view(_BITS[tensor.element_size()]))
    return bits


class KeptValues:
    """The bits of tensors on the CPU as they were: whatever writes to them, of one element or by one ulp, is seen.

    Args:
        bits: what is looked at, as integers, where it is now.
    """

    def __init__(self, bits: Sequence[Tensor]) -> None:
        few = [one for one in bits if one.numel() < _LARGE and one.is_contiguous()]
        by_dtype = {dtype: [one.flatten() for one in few if one.dtype == dtype] for dtype in _BITS.values()}
        self._small = [some for some in by_dtype.values() if some]
        # numpy compares four times as fast as torch. Not Tensor.numpy(), after which torch refuses to resize a storage.
        self._large = [np.from_dlpack(one) for one in bits if one.numel() >= _LARGE or not one.is_contiguous()]
        self._then = [*map(torch.cat, self._small)], [one.copy() for one in self._large]

    def same(self) -> bool:
        """Whether all are what they were; they must be where they were."""
        small, large = self._then
        return all(map(torch.equal, map(torch.cat, self._small), small)) and all(
            map(np.array_equal, self._large, large)
        )


def is_plain(tensor: Tensor) -> bool:
    """Tells whether a tensor's values are those in its memory: it is of no class of its own, nor negated when read."""
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_neg()


def has_version(tensor: Tensor) -> bool:
    """Tells whether a tensor has a version that tells of all writes which torch counts, and a place in memory."""
    return is_plain(tensor) and not tensor.is_inference()


def _may_look(tensors: Sequence[Tensor]) -> bool:
    plain = all(tensor.is_cpu and is_plain(tensor) for tensor in tensors)
    return plain and not is_watched() and (not tensors or can_read(tensors[0]))  # which costs as much as all the rest


def _state(tensor: Tensor, watched: bool) -> tuple[object, ...]:
    """The version, and what .data may change without one; sizes of a tensor that is traced are none to compare."""
    where = tensor._version, tensor.data_ptr(), tensor.dtype
    return where if watched else (*where, tensor.shape, tensor.stride())


class KeptTensors:
    """Tensors as they were: in what memory, of what version, and of what bits, as a write through .data has no version.

    Their bits are compared where the host may look at them: not on a GPU, whose stream that would stop, nor while a
    CUDA graph is captured, nor where torch traces or transforms. There versions alone tell; but what was kept on other
    terms, as before a move to the GPU, counts as changed.

    Args:
        tensors: with versions, so not made in inference mode.
        live: tensors made of them; what one of these is a view of needs no look at its bits.
        by_version: versions are believed everywhere.
    """

    def __init__(self, tensors: Sequence[Tensor], live: Sequence[Tensor] = (), by_version: bool = False) -> None:
        self._by_version = by_version
        self._watched = is_watched()
        # While these live nothing else is in their memory. With weak references torch would refuse to swap tensors.
        self._memory = [tensor.detach() for tensor in tensors]
        self.has_values = not by_version and _may_look(tensors)
        bits = _compared(tensors, live) if self.has_values else []
        module = None if self._watched or not all(map(is_plain, tensors)) else extension()
        self._native = None if module is None else module.KeptTensors(list(tensors), bits)
        self._states = [] if self._native else [_state(tensor, self._watched) for tensor in tensors]
        self._values = KeptValues(bits) if self.has_values and self._native is None else None

    def _in_place(self, tensors: Sequence[Tensor]) -> bool:
        if self._native is not None:
            found: bool = self._native.in_place(list(tensors))
            return found
        told = not any(tensor.is_inference() or tensor.is_neg() for tensor in tensors)
        return told and [_state(tensor, self._watched) for tensor in tensors] == self._states

    def _same_values(self) -> bool:
        if self._native is None:
            return self._values is None or self._values.same()
        found: bool = self._native.same_bits()
        return found

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Tells whether these are the tensors as they were, or others in their place."""
        if is_watched() != self._watched or not self._in_place(tensors):
            return False
        if self._by_version:
            return True
        # In place the extension has found none but plain tensors, on the devices of then.
        looks = can_read(self._memory[0]) if self._native and self.has_values and tensors else _may_look(tensors)
        return looks == self.has_values and self._same_values()
