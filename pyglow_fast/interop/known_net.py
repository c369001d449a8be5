"""Describes a coupling net that this package's executor runs: its layers, their weights, and how far it looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyglow_fast import functional
from pyglow_fast.reference import Activation, ChainSpec, n_positions, sides

Affine = tuple[Tensor, Tensor]  # scale and offset of a map per channel, (C,) each


def _batch_norm(norm: Any, dims: int) -> Affine:
    """A BatchNorm in evaluation mode is (x - mean) weight / sqrt(var + eps) + bias."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    offset = -norm.running_mean * scale
    return scale, offset if norm.bias is None else offset + norm.bias


# WRAPPERS: modules whose forward is that of one child, by qualified name. AFFINE_MAPS: maps per channel, (module,
# spatial dimensions) -> scale and offset, or None while they wait for data. Adapters enter those of their library.
WRAPPERS: dict[str, str] = {"normflows.nets.cnn.ConvNet2d": "net", "normflows.nets.mlp.MLP": "net"}
AFFINE_MAPS: dict[str, Callable[[nn.Module, int], Affine | None]] = {
    f"torch.nn.modules.batchnorm.BatchNorm{size}d": _batch_norm for size in (1, 2, 3)
}
# Maps per channel that are kept as (log_scale, offset), which a run multiplies in itself; entered like AFFINE_MAPS.
LOG_MAPS: dict[str, Callable[[nn.Module, int], Affine | None]] = {}
# Which convolutions are better left to the library: those with at least so many channels (in float32, in 16 bits) on
# both sides, at most this ratio between the sides, and at least so many multiply-adds for a batch.
LEAST_SQUARE, LEAST_SQUARE_IN_HALF, MOST_RATIO, LEAST_WORK = 48, 16, 4, 2e8
LEAST_ROWS, MOST_FEATURES = 1024, 512  # at least so many vectors, layers at most so wide: see pays
LAYERS: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}  # spatial dimensions
NORMS: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, with maps per channel ``before`` it and ``after`` it."""

    module: Any
    before: Sequence[nn.Module]
    after: Sequence[nn.Module]

    def folded(self, before: Sequence[Affine], after: Sequence[Affine]) -> tuple[Tensor, Tensor]:
        """Fold the maps, as scales and offsets, into weight and bias, which are returned, differentiable."""
        weight, bias = self.module.weight, self.module.bias  # once: what parametrizes them may change when it is asked
        if bias is None:
            bias = weight.new_zeros(weight.shape[0])
        spatial = (1,) * (weight.dim() - 2)
        for scale, offset in reversed(before):  # nothing is padded: the kernel has one position
            bias = bias + (weight.flatten(1) * offset).sum(1)  # no product: autocast would round it
            weight = weight * scale.view(1, -1, *spatial)
        for scale, offset in after:
            weight, bias = weight * scale.view(-1, 1, *spatial), bias * scale + offset
        return weight, bias


def _affine_map(module: nn.Module, dims: int) -> Affine | None:
    name = qualified(plain_type(module))
    if name in AFFINE_MAPS:
        return AFFINE_MAPS[name](module, dims)
    found = LOG_MAPS[name](module, dims)
    return None if found is None else (found[0].exp(), found[1])


@dataclass(frozen=True)
class KnownNet:
    """A net that is recognised: its layers, and ``spec``, which functional.net_chain takes besides weights.

    ``last`` is an activation that follows the chain, or None.
    """

    layers: tuple[Layer, ...]
    spec: ChainSpec
    last: Activation | None = None

    @property
    def dims(self) -> int:
        """How many spatial dimensions the net has, 0 for vectors."""
        return len(self.spec.dilations[0])

    @property
    def reach(self) -> tuple[int, ...]:
        """How many positions to each side an output depends on, along each spatial dimension."""
        kernels = [layer.module.kernel_size if self.dims else () for layer in self.layers]
        every = [sides(kernel, dilation) for kernel, dilation in zip(kernels, self.spec.dilations, strict=True)]
        return tuple(map(sum, zip(*every, strict=True)))

    @property
    def channels(self) -> list[int]:
        """The channels of the input and behind each layer."""
        return [widths(self.layers[0].module)[0], *(widths(layer.module)[1] for layer in self.layers)]

    @property
    def is_parametrized(self) -> bool:
        """Whether weights are computed when they are asked for, and may be others when asked for again."""
        return any(parametrizations(layer.module) for layer in self.layers)

    def weights_and_biases(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Compute every layer's tensors for functional.net_chain, differentiable; None while a map waits for data.

        The weight of each layer is asked for once, as in a call of the net, and never where None is returned.
        """
        found = []
        for layer in self.layers:
            before, after = self._maps(layer.before), self._maps(layer.after)
            if before is None or after is None:
                return None
            found.append((layer, before, after))
        weights, biases = zip(*(layer.folded(before, after) for layer, before, after in found), strict=True)
        return list(weights), list(biases)

    def chain_tensors(self) -> tuple[list[Tensor], tuple[float, ...]] | None:
        """Compute the tensors of a Chain, and its powers; None while a map waits for data.

        The one map behind a layer without a bias is left to the run where it is kept by its logarithm: so nothing of
        the size of a weight is made here.
        """
        tensors: list[Tensor] = []
        powers = []
        for layer in self.layers:
            before, after, log_map = self._maps(layer.before), self._maps(layer.after), self._log_map(layer)
            if before is None or after is None:
                return None
            if log_map is None:
                tensors += layer.folded(before, after)
            else:
                log_scale, offset = log_map
                tensors += [layer.module.weight, offset * (-log_scale).exp(), log_scale]
            powers.append(0.0 if log_map is None else 1.0)
        return tensors, tuple(powers)

    def _log_map(self, layer: Layer) -> Affine | None:
        if layer.before or len(layer.after) != 1 or layer.module.bias is not None:
            return None
        read = LOG_MAPS.get(qualified(plain_type(layer.after[0])))
        return None if read is None else read(layer.after[0], self.dims)

    def _maps(self, modules: Sequence[nn.Module]) -> list[Affine] | None:
        found = [_affine_map(module, self.dims) for module in modules]
        ready = [channel_map for channel_map in found if channel_map is not None]
        return ready if len(ready) == len(found) else None

    def pays(self, x: Tensor) -> bool:
        """Whether products of this package are as fast as the library's layers on x; see docs/speed.md.

        Products are slower in three cases. Most of the work, and much work, is in convolutions of images with more than
        one tap between about as many channels: the library convolves directly and gathers nothing. There are few
        vectors, whose cost is that of packing the weights. Or vectors meet wide layers.
        """
        if self.dims == 0:
            return x.shape[0] >= LEAST_ROWS and max(self.channels) <= MOST_FEATURES
        if self.dims != 2:
            return True
        square = every = 0
        least = LEAST_SQUARE_IN_HALF if functional.net_in_half(x) else LEAST_SQUARE
        for layer in self.layers:
            narrow, wide = sorted(widths(layer.module))
            taps = math.prod(layer.module.kernel_size)
            work = narrow * wide * taps
            every += work
            square += work if taps > 1 and narrow >= least and wide <= MOST_RATIO * narrow else 0
        return 2 * square < every or square * n_positions(x) * x.shape[0] < LEAST_WORK

    def takes(self, x: Tensor, cond: Tensor | None = None) -> bool:
        """Whether x, with cond beside it, has the net's dimensions and channels, and the dtype of its weights."""
        channels = x.shape[1] if x.dim() > 1 else 0
        if cond is not None:
            beside = cond.dim() == x.dim() and cond.shape[0] == x.shape[0] and cond.shape[2:] == x.shape[2:]
            if not beside or (cond.dtype, cond.device) != (x.dtype, x.device):
                return False
            channels += cond.shape[1]
        if x.dim() != self.dims + 2 or channels != widths(self.layers[0].module)[0]:
            return False
        return all((part.dtype, part.device) == (x.dtype, x.device) for part in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for module in (layer.module, *layer.before, *layer.after):
                # Where the module has modules of its own (a parametrization, a library's actnorm), their parameters
                # count too.
                own = module.parameters() if module._modules else module._parameters.values()
                yield from (value for value in own if value is not None)
                if isinstance(module, _BatchNorm):
                    yield from (value for value in module.buffers() if value.is_floating_point())


def qualified(module_class: type) -> str:
    """Write the full name of a class."""
    return f"{module_class.__module__}.{module_class.__qualname__}"


def parametrizations(module: nn.Module) -> dict[str, Any]:
    """Find what computes tensors of a module when they are asked for, by their names."""
    found: Any = module._modules.get("parametrizations")  # not by getattr, which is slow where there are none
    return found._modules if isinstance(found, nn.ModuleDict) else {}


def plain_type(module: nn.Module) -> type:
    """Find the class of a module, without the one that torch's parametrizations put in its place."""
    module_class, computed = type(module), parametrizations(module)
    if not computed:
        return module_class
    by_copies = {"__getstate__", "__deepcopy__", "__slotnames__"}  # which do not change what it computes
    added = vars(module_class).keys() - {"__module__", "__doc__", *by_copies}
    by_torch = module_class.__name__ == f"Parametrized{module_class.__mro__[1].__name__}"
    return module_class.__mro__[1] if by_torch and added <= computed.keys() else module_class


def widths(layer: Any) -> tuple[int, int]:
    """Read how many channels a layer gets and gives."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels
