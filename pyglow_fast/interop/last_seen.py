"""Tells whether tensors are what they were when they were last looked at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast._errors import can_read
from pyglow_fast._tracing import is_watched


class LastSeen:
    """Small tensors as they were: by value where the host may read one, on a GPU by the version that torch counts.

    Args:
        tensors: not made in inference mode, where they have no version.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._watched = is_watched()
        self._known = [(one, one._version, one.detach().clone() if can_read(one) else None) for one in tensors]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether these are the tensors, with the same values or versions."""
        if is_watched() != self._watched or len(tensors) != len(self._known):
            return False
        for now, (tensor, version, value) in zip(tensors, self._known, strict=True):
            if now is not tensor or (now._version != version if value is None else not _equal(now, value)):
                return False
        return True


def _equal(now: Tensor, then: Tensor) -> bool:
    return can_read(now) and now.dtype == then.dtype and now.shape == then.shape and torch.equal(now.detach(), then)
