"""Coupling nets of other libraries, run by ours where they compute what it computes: 3x3, ReLU, 1x1, ReLU, 3x3.

A net is recognised by its modules, exactly: plain convolutions with zero padding, ReLU or LeakyReLU in between, both of
one slope, and after a hidden convolution an affine map per channel, which is folded into it. Anything else (hooks,
parametrizations, subclasses, other sizes) runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.coupling_nets.traits import has_hooks

# Modules whose forward is that of one child, by qualified name; and affine maps per channel: scale and offset, (C,), or
# None while they wait for data. Adapters enter those of their library.
WRAPPERS: dict[str, str] = {"normflows.nets.cnn.ConvNet2d": "net"}
AFFINE_MAPS: dict[str, Callable[[nn.Module], tuple[Tensor, Tensor] | None]] = {}


def qualified(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


@dataclass(frozen=True)
class KnownNet:
    """The convolutions of a recognised net, what follows the hidden ones, and the slope of both its activations."""

    convs: tuple[nn.Conv2d, nn.Conv2d, nn.Conv2d]
    maps: tuple[nn.Module | None, nn.Module | None]
    leak: float

    def weights(self) -> list[Tensor] | None:
        """w1, b1, w2, b2, w3, b3 for functional.coupling_net, differentiable; None while a map waits for data."""
        found: list[Tensor] = []
        for conv, channel_map in zip(self.convs, (*self.maps, None), strict=True):
            weight = conv.weight
            bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias
            if channel_map is not None:
                parts = AFFINE_MAPS[qualified(channel_map)](channel_map)
                if parts is None:
                    return None
                scale, offset = parts
                weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + offset
            found += [weight, bias]
        return found


def slope(activation: nn.Module) -> float | None:
    """Of a LeakyReLU what it multiplies negative values by, of a ReLU 0; None of any other module."""
    if type(activation) is nn.ReLU:
        return 0.0
    return float(activation.negative_slope) if type(activation) is nn.LeakyReLU else None


def recognised(net: nn.Module) -> KnownNet | str:
    """The net as our executor takes it, or why it does not."""
    parts = _flat(net)
    if isinstance(parts, str):
        return parts
    convs: list[nn.Conv2d] = []
    maps: list[nn.Module | None] = []
    slopes: list[float] = []
    expected = "conv"
    for part in parts:
        name = type(part).__name__
        if expected == "conv":
            if type(part) is not nn.Conv2d:
                return f"a {name} where a Conv2d was expected"
            convs.append(part)
            maps.append(None)
            expected = "map or activation"
        elif qualified(part) in AFFINE_MAPS and expected == "map or activation":
            maps[-1] = part
            expected = "activation"
        elif (leak := slope(part)) is None:
            return f"a {name} where a ReLU or LeakyReLU was expected"
        elif not 0.0 <= leak <= 1.0:
            return f"a {name} of slope {leak:g}, which is not from 0 to 1"
        else:
            slopes.append(leak)
            expected = "conv"
    if len(convs) != 3 or expected != "map or activation":
        return f"{len(convs)} convolutions, not 3 with nothing after the last"
    for conv, size in zip(convs, (3, 1, 3), strict=True):
        reason = _odd(conv, size)
        if reason:
            return reason
    if slopes[0] != slopes[1]:
        return f"activations of different slopes, {slopes[0]:g} and {slopes[1]:g}"
    first, second, third = convs
    return KnownNet((first, second, third), (maps[0], maps[1]), slopes[0])


def _odd(conv: nn.Conv2d, size: int) -> str:
    """What is unusual about a convolution, or nothing."""
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    padding = conv.padding if isinstance(conv.padding, tuple) else (size // 2,) * 2 if conv.padding == "same" else None
    if conv.kernel_size != (size, size) or padding != (size // 2, size // 2) or not plain:
        return f"a convolution {conv} where a plain {size}x{size} one was expected"
    return ""


def _flat(net: nn.Module) -> list[nn.Module] | str:
    """The modules of a chain in order, or why it is none."""
    if has_hooks(net):
        return f"hooks on its {type(net).__name__}"
    if "forward" in vars(net) or torch.nn.modules.module._has_any_global_hook():
        return f"a forward of its own, or hooks on all modules, at its {type(net).__name__}"
    if hasattr(net, "parametrizations"):
        return f"a parametrization of its {type(net).__name__}"
    if type(net) is nn.Sequential:
        children = list(net)
    elif qualified(net) in WRAPPERS:
        children = [net.get_submodule(WRAPPERS[qualified(net)])]
    elif type(net) is nn.Identity:
        return []
    else:
        return [net]
    found: list[nn.Module] = []
    for child in children:
        parts = _flat(child)
        if isinstance(parts, str):
            return parts
        found += parts
    return found


def run(net: nn.Module, x: Tensor, output_map: Callable[[Tensor, int], Tensor] | None = None) -> Tensor:
    """net(x), by our executor where it is recognised and x is one that it takes.

    ``output_map(values, dim)`` is a linear map of the output channels, which are dimension ``dim`` of ``values``: then
    output_map(net(x), 1), and in our executor of the last weights instead, so that it costs no pass over the output.
    """
    found = _weights(net, x)
    if found is None:
        out: Tensor = net(x)
        return out if output_map is None else output_map(out, 1)
    weights, leak = found
    if output_map is not None:
        weights[-2:] = [output_map(weight, 0) for weight in weights[-2:]]
    return functional.coupling_net(x, *weights, leak=leak)


def _weights(net: nn.Module, x: Tensor) -> tuple[list[Tensor], float] | None:
    """Weights and leak of a recognised net whose executor takes x."""
    if not functional.net_as_products(x) or torch.compiler.is_compiling():
        return None
    known = recognised(net)
    if isinstance(known, str):
        return None
    weights = known.weights()
    if weights is None or any(weight.dtype != x.dtype for weight in weights) or x.shape[1] != weights[0].shape[1]:
        return None
    return weights, known.leak
