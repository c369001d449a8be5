"""How far a chain of layers sees and what it costs, told from its description alone; see reference.net_chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyglow_fast import functional, ops
from pyglow_fast.reference import ChainSpec, sides


class Chain(NamedTuple):
    """A coupling net as the run computes it: w_L * h_(L-1) + b_L, h_l = a_l(w_l * h_(l-1) + b_l).

    Attributes:
        tensors: of each layer weight, bias and, if its power is not 0, log_scale: both are multiplied by
            exp(power log_scale).
        powers: of each layer.
        spec: the activations and dilations.
    """

    tensors: list[Tensor]
    powers: tuple[float, ...]
    spec: ChainSpec

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum([tensor.numel() for tensor in self.tensors]) * self.tensors[0].element_size()

    @property
    def last_weight(self) -> Tensor:
        """The weight of the last layer, whose outputs are the net's."""
        return self.tensors[-2 if self.powers[-1] == 0 else -3]


def reach(kernel_sizes: Sequence[Sequence[int]], dilations: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Compute how far an output position of the chain sees, along each dimension: the sum over its layers."""
    every = [sides(sizes, dilation) for sizes, dilation in zip(kernel_sizes, dilations, strict=True)]
    return tuple(map(sum, zip(*every, strict=True)))


def bytes_per_position(
    channels: Sequence[int], kernel_sizes: Sequence[Sequence[int]], spec: ChainSpec, like: Tensor, element_size: int
) -> int:
    """Compute the most bytes alive in forward and backward of a chain run as matrix products, per sample and position.

    Counted are what is kept of its hidden layers; the gradients behind those convolutions whose backward reads the
    positions around, which are held for whole samples (both in bfloat16 where the net runs in that); and the output,
    its gradient and the input.

    Args:
        channels: of the input, behind each layer, of the output.
        kernel_sizes: of each layer.
        spec: of the chain.
        like: a tensor of its dtype and device.
        element_size: bytes of a number where it is not bfloat16.
    """
    hidden = channels[1:-1]
    rows = ops.kept_per_position(hidden, ops.chain_arguments(spec)[0])
    looks = [math.prod(sizes) > 1 for sizes in kernel_sizes[: len(hidden)]]
    if looks and 2 * channels[0] <= channels[1]:
        looks[0] = False  # its taps are summed after the product
    rows += sum(width for width, around in zip(hidden, looks, strict=True) if around)
    edges = 3 * channels[-1] + 2 * channels[0]
    return rows * (2 if functional.net_in_half(like) else element_size) + edges * element_size
