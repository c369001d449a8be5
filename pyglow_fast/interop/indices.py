"""Keeps indices that the host knows on the devices that ask for them: copied once, as a capture allows none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast._captures import made_once

REMEMBERED = 4096  # permutations, C numbers each, of all models of a process


@made_once(REMEMBERED)
def _copied(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)


@made_once(REMEMBERED)
def _undoing(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device).argsort()


def indices_on(indices: Sequence[int], device: torch.device) -> Tensor:
    """Put indices on a device: (C,) int64, which are not to be written to."""
    return _copied(tuple(map(int, indices)), device)


def undoing_indices_on(indices: Sequence[int], device: torch.device) -> Tensor:
    """Put the indices that undo a permutation on a device: (C,) int64, which are not to be written to."""
    return _undoing(tuple(map(int, indices)), device)
