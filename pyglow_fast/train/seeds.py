"""Derives independent random streams from one seed: drawing more from one never shifts another."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast.likelihood import dequantize


def derive(seed: int, *names: str | int) -> int:
    """Derive a 63-bit seed for the stream that ``names`` describe; it is the same on every machine."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def batch_indices(seed: int, step: int, n_images: int, batch_size: int) -> Tensor:
    """Choose the images of a step (from 0): each epoch is a fresh shuffle, its incomplete last batch dropped."""
    epoch, position = divmod(step, n_images // batch_size)
    # A copy, so that nobody can write into the order that is kept.
    return _order(seed, epoch, n_images)[position * batch_size : (position + 1) * batch_size].clone()


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n_images: int) -> Tensor:
    """The order of one epoch; two are kept, as one reads ahead and to shuffle millions takes longer than a step."""
    return torch.randperm(n_images, generator=torch.Generator().manual_seed(derive(seed, "order", epoch)))


def random_subset(seed: int, n_images: int, count: int) -> Tensor:
    """Choose ``count`` of ``n_images`` indices, sorted; a larger subset contains a smaller one of the same seed."""
    if count >= n_images:
        return torch.arange(n_images)
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(derive(seed, "subset")))
    return order[:count].sort().values


def keyed_noise(keys: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Draw u ~ U[0, 1), (len(keys), *shape), float32, for each key from a stream of its own; a GPU has others."""
    noise = torch.empty(len(keys), *shape, device=device)
    generator = torch.Generator(device)
    for key, part in zip(keys, noise, strict=True):
        torch.rand(part.shape, generator=generator.manual_seed(key), device=device, out=part)
    return noise


def noisy(pixels: Tensor, keys: list[int], n_bins: int, device: torch.device) -> Tensor:
    """Dequantise ``pixels``: x in [-0.5, 0.5), each image with the noise that its key determines."""
    pixels = pixels.to(device, non_blocking=True)
    return dequantize(pixels, n_bins, noise=keyed_noise(keys, pixels.shape[1:], device))
