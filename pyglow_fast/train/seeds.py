"""Independent random streams from one seed, so that drawing more from one never shifts another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream that ``names`` describe; the same on every machine."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batch_indices(seed: int, step: int, n_images: int, batch_size: int) -> Tensor:
    """Which images step ``step`` (from 0) trains on: every epoch is a fresh shuffle, its incomplete last batch dropped.

    A function of the step alone, so a resumed run needs no stored order.
    """
    epoch, position = divmod(step, n_images // batch_size)
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(derive(seed, "order", epoch)))
    return order[position * batch_size : (position + 1) * batch_size]
