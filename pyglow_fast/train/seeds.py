"""Derives independent random streams from one seed: drawing more from one never shifts another."""

from __future__ import annotations

import functools
import hashlib
import math
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
    return _order(seed, epoch, n_images)[position * batch_size : (position + 1) * batch_size]


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


def keyed_noise(keys: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw u ~ U[0, 1), (n, *shape), float32: a function of key and place alone, the same on every device.

    The place plus half of the key goes through a hash of 32 bits, "triple32" (Wellons 2018, "Prospecting for Hash
    Functions"), the other half is added on the way. There are as many launches for many keys as for one.

    Args:
        keys: int64 (n,), as :func:`derive` makes them.
        shape: of the noise of one key.
    """
    first, second = keys.view(torch.int32).view(-1, 2, 1).unbind(1)
    x = first + torch.arange(math.prod(shape), dtype=torch.int32, device=keys.device)
    x = _folded(x, 17).mul_(0xED5AD4BB - (1 << 32)).add_(second)
    x = _folded(x, 11).mul_(0xAC4C1B51 - (1 << 32))
    x = _folded(x, 15).mul_(0x31848BAB)
    return (_folded(x, 14) >> 8).float().mul_(2.0**-24).add_(0.5).unflatten(1, tuple(shape))


def _folded(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits, where x is int32 and zeros are to be shifted in."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def noisy(pixels: Tensor, keys: Tensor, n_bins: int) -> Tensor:
    """Dequantise ``pixels``: x in [-0.5, 0.5), each image with the noise that its key determines."""
    return dequantize(pixels, n_bins, noise=keyed_noise(keys, pixels.shape[1:]))
