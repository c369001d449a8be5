"""Drift that is planted: states that the compiled run recomputes are off by a factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyglow_fast._backend import require
from pyglow_fast.runs import compiled


class _Wrong:
    """The extension, whose backward of a run in mode "reversible" begins from another output than the true one."""

    def __init__(self, factor: Tensor, only: int | None) -> None:
        self._factor, self._only, self._calls = factor, only, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(require(), name)

    def BackwardArgs(self, z: Any, **rest: Any) -> Any:
        """With z off by the factor in all nodes, or in one, counted from the last."""
        self._calls += 1
        wrong = z is not None and self._only in (None, self._calls)  # none where all states are kept
        return require().BackwardArgs(z=z * self._factor if wrong else z, **rest)


def plant(patch: pytest.MonkeyPatch, factor: float | Tensor, only: int | None = None) -> Tensor:
    """Make the states wrong from now on; the factor may be written to later.

    Args:
        patch: undoes it.
        factor: that the output, from which a backward begins, is multiplied by.
        only: of so many nodes that a backward runs through, counted from 1, that one; None: all.
    """
    held = torch.as_tensor(factor)
    wrong = _Wrong(held, only)
    patch.setattr(compiled, "require", lambda: wrong)
    return held
