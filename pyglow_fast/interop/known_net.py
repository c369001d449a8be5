"""Describes a coupling net that this package's executor runs: its layers, their weights, and how far it looks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.reference import ChainSpec, n_positions, sides

Affine = tuple[Tensor, Tensor]  # log_scale and offset of a map per channel, h exp(log_scale) + offset, (C,) each

# WRAPPERS: modules whose forward is that of their ``net``. LOG_MAPS: maps per channel, (module, spatial dimensions) ->
# Affine, or None while they wait for data. Both by qualified name; adapters enter those of their library.
WRAPPERS = {"normflows.nets.cnn.ConvNet2d"}
LOG_MAPS: dict[str, Callable[[nn.Module, int], Affine | None]] = {}
# Which convolutions are better left to the library: those with at least so many channels (in float32, in 16 bits) on
# both sides, at most this ratio between the sides, and at least so many multiply-adds for a batch.
LEAST_SQUARE, LEAST_SQUARE_IN_HALF, MOST_RATIO, LEAST_WORK = 48, 16, 4, 2e8


@dataclass(frozen=True)
class Layer:
    """A convolution, and what reads the map per channel behind it, if there is one: None while that waits for data."""

    conv: Any
    read_map: Callable[[], Affine | None] | None = None

    @property
    def widths(self) -> tuple[int, int]:
        """The channels of its input and of its output."""
        return self.conv.weight.shape[1], self.conv.weight.shape[0]

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Its size along each spatial dimension."""
        return tuple(self.conv.weight.shape[2:])

    def tensors(self, folds: bool) -> list[Tensor] | None:
        """Compute weight and bias, and the map's log_scale behind both: exp(log_scale) (w * h + b).

        Where it ``folds``, weight and bias have the scale in them. None while the map waits for data, or is of another
        width.
        """
        weight, bias = self.conv.weight, self.conv.bias
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        if self.read_map is None:
            return [weight, bias]
        found = self.read_map()
        if found is None or len(found[0]) != len(weight):
            return None
        log_scale, offset = found
        if not folds:
            return [weight, bias + offset * (-log_scale).exp(), log_scale]
        scale = log_scale.exp()
        return [weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias * scale + offset]


@dataclass(frozen=True)
class KnownNet:
    """A net that is recognised: its layers, and ``spec``, which functional.net_chain takes besides weights."""

    layers: tuple[Layer, ...]
    spec: ChainSpec

    @property
    def dims(self) -> int:
        """The number of spatial dimensions."""
        return len(self.spec.dilations[0])

    @property
    def halo(self) -> int:
        """The number of positions to each side that an output depends on, the most of any dimension."""
        pairs = zip(self.layers, self.spec.dilations, strict=True)
        every = [sides(layer.kernel_size, dilation) for layer, dilation in pairs]
        return max(map(sum, zip(*every, strict=True)))

    def takes(self, x: Tensor, cond: Tensor | None) -> bool:
        """Whether x, with cond beside it, has the net's dimensions and channels."""
        channels = x.shape[1] + (0 if cond is None else cond.shape[1])
        return x.dim() == self.dims + 2 and channels == self.layers[0].widths[0]

    def tensors(self, folds: bool, folds_last: bool = True) -> list[list[Tensor]] | None:
        """Compute the tensors of each layer, differentiable; None while a map waits for data.

        folds, folds_last: weights and biases have the scales behind them in them, those of the last layer too.
        """
        found = [layer.tensors(folds if layer is not self.layers[-1] else folds_last) for layer in self.layers]
        ready = [own for own in found if own is not None]
        return ready if len(ready) == len(found) else None

    def pays(self, x: Tensor) -> bool:
        """Whether products of this package are as fast as the library's layers on x; see docs/speed.md.

        They are slower where most of the work, and much work, is in convolutions of images with more than one tap
        between about as many channels: the library convolves directly and gathers nothing.
        """
        if self.dims != 2:
            return True
        square = every = 0
        least = LEAST_SQUARE_IN_HALF if functional.net_in_half(x) else LEAST_SQUARE
        for layer in self.layers:
            narrow, wide = sorted(layer.widths)
            taps = math.prod(layer.kernel_size)
            work = narrow * wide * taps
            every += work
            square += work if taps > 1 and narrow >= least and wide <= MOST_RATIO * narrow else 0
        return 2 * square < every or square * n_positions(x) * x.shape[0] < LEAST_WORK


def qualified(module_class: type) -> str:
    """Write the full name of a class."""
    return f"{module_class.__module__}.{module_class.__qualname__}"
