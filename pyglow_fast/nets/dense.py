"""Dense nets: convolutions, each of the input and of all that the ones before it gave, with leaky relus between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def run_dense(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float) -> Tensor:
    """h_l = leaky_relu(w_l * [x, h_1, ..., h_(l-1)] + b_l); gives w_L * [x, h_1, ..., h_(L-1)] + b_L.

    What is to be convolved is never put together: each h_l is convolved once, to all layers behind it, which sum what
    they get. So the backward needs x and the h_l alone, a third of what concatenations keep, in no more time.

    Args:
        x: (N, C, *spatial).
        weights: of L layers, (C_l, C + C_1 + ... + C_(l-1), *kernel), the kernel odd and the same for all.
        biases: (C_l,).
        slope: of the leaky relu, at least 0.
    """
    convolve, widths = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3], [len(weight) for weight in weights]
    pads = [size // 2 for size in weights[0].shape[2:]]
    first = [weight[:, : x.shape[1]] for weight in weights]
    # The first layer's apart, as the rest is a view of all layers' sums, which a relu in place would keep alive.
    sums = [convolve(x, first[0], biases[0], padding=pads)]
    if len(weights) > 1:
        behind = convolve(x, torch.cat(first[1:]), torch.cat(list(biases[1:])), padding=pads)
        sums += behind.split(widths[1:], 1)
    dtype, at = sums[0].dtype, x.shape[1]
    if dtype in (torch.float16, torch.bfloat16):  # partial sums are not to be rounded to it
        sums = [part.float() for part in sums]
    for layer in range(1, len(weights)):
        h = F.leaky_relu(sums[0], slope, inplace=True).to(x.dtype)
        own = torch.cat([weight[:, at : at + h.shape[1]] for weight in weights[layer:]])
        parts = convolve(h, own, padding=pads).split(widths[layer:], 1)
        sums, at = [before + part for before, part in zip(sums[1:], parts, strict=True)], at + h.shape[1]
    return sums[0].to(dtype)


def dense_halo(weights: Sequence[Tensor]) -> int:
    """How many positions to each side an output of :func:`run_dense` depends on, the most of any dimension."""
    return len(weights) * (max(weights[0].shape[2:]) // 2)


def dense_bytes(weights: Sequence[Tensor], element_size: int) -> int:
    """The most bytes alive in forward and backward of :func:`run_dense`, per sample and position.

    These are x and the hidden layers, the sums of all layers behind the first, twice while they are added to, and
    gradients of both.
    """
    widths = [len(weight) for weight in weights]
    return (2 * (weights[0].shape[1] + sum(widths[:-1])) + 2 * sum(widths)) * element_size
