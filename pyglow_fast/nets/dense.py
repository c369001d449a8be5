"""Dense nets: convolutions, each of the input and of all that the ones before it gave, with leaky relus between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DenseForm(NamedTuple):
    """w_L * [x, h_1, ..., h_(L-1)] + b_L, h_l = leaky_relu(w_l * [x, h_1, ..., h_(l-1)] + b_l).

    With a record, what is to be convolved is never put together: each h_l is convolved once, to all layers behind it,
    which sum what they get. So the backward needs x and the h_l alone, a third of what concatenations keep. Without
    one, concatenations are faster.
    """

    weights: Sequence[Tensor]  # (C_l, C + C_1 + ... + C_(l-1), *kernel), the kernel odd and the same for all
    biases: Sequence[Tensor | None]  # (C_l,), or None for zeros
    slope: float  # of the leaky relu, at least 0

    @property
    def halo(self) -> int:
        """The number of positions to each side that an output depends on, the largest over dimensions."""
        return len(self.weights) * (max(self.weights[0].shape[2:]) // 2)

    def bytes_per_position(self, element_size: int) -> int:
        """The most bytes alive in forward and backward, per sample and position.

        They are x and the hidden layers, the gradients of all layers' sums, these once more as one convolution's, and
        the output.
        """
        widths = [len(weight) for weight in self.weights]
        return (self.weights[0].shape[1] + 3 * sum(widths)) * element_size

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, C, *spatial) to (N, C_L, *spatial)."""
        convolve, widths = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3], [len(weight) for weight in self.weights]
        pads = [size // 2 for size in self.weights[0].shape[2:]]
        biases = [own.new_zeros(len(own)) if b is None else b for own, b in zip(self.weights, self.biases, strict=True)]
        if not torch.is_grad_enabled():
            seen = x
            for weight, bias in zip(self.weights[:-1], biases, strict=False):
                h = F.leaky_relu(convolve(seen, weight, bias, padding=pads), self.slope, inplace=True)
                seen = torch.cat([seen, h], dim=1)
            return convolve(seen, self.weights[-1], biases[-1], padding=pads)
        first = [weight[:, : x.shape[1]] for weight in self.weights]
        # The first layer's apart: a relu in place would keep all layers' sums alive, if it were a view of them.
        sums = [convolve(x, first[0], biases[0], padding=pads)]
        if first[1:]:
            sums += convolve(x, torch.cat(first[1:]), torch.cat(biases[1:]), padding=pads).split(widths[1:], 1)
        dtype, at = sums[0].dtype, x.shape[1]
        if dtype in (torch.float16, torch.bfloat16):  # partial sums are not to be rounded to it
            sums = [part.float() for part in sums]
        for layer in range(1, len(widths)):
            h = F.leaky_relu(sums[0], self.slope, inplace=True).to(x.dtype)
            own = torch.cat([weight[:, at : at + h.shape[1]] for weight in self.weights[layer:]])
            parts = convolve(h, own, padding=pads).split(widths[layer:], 1)
            sums, at = [before + part for before, part in zip(sums[1:], parts, strict=True)], at + h.shape[1]
        return sums[0].to(dtype)
