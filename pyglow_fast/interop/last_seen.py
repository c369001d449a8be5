"""Tells whether tensors are what they were when they were last looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast._errors import can_read
from pyglow_fast._tracing import is_watched


class LastSeen:
    """Small tensors as they were: where, and by value if the host may read one, else by the version that torch counts.

    Args:
        tensors: not made in inference mode, where they have no version. Views made anew are the same tensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._watched = is_watched()
        # While these live nothing else is in their memory.
        self._known = [(one.detach(), one._version, one.detach().clone() if can_read(one) else None) for one in tensors]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether these are the tensors, with the same values or versions."""
        if is_watched() != self._watched or len(tensors) != len(self._known):
            return False
        known = zip(tensors, self._known, strict=True)
        return all(_in_place(now, there) and _unchanged(now, version, value) for now, (there, version, value) in known)


def _in_place(now: Tensor, then: Tensor) -> bool:
    if now.is_inference() or now.data_ptr() != then.data_ptr():
        return False
    return (now.dtype, now.shape, now.stride()) == (then.dtype, then.shape, then.stride())


def _unchanged(now: Tensor, version: int, value: Tensor | None) -> bool:
    return now._version == version if value is None or not can_read(now) else torch.equal(now.detach(), value)
