"""Reads coupling nets of other libraries as chains of convolutions that this package's executor computes.

A net is recognised if it consists of exactly these modules: one to six convolutions (1-d, 2-d or 3-d) that keep the
size by padding with zeros, an activation or none between two of them, and right behind a convolution perhaps a map per
channel (an actnorm of a library), which is folded into it. A net with anything else (hooks, subclasses,
parametrizations, other norms, strides, other paddings) runs as it is, and the reason names the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional, reference
from pyglow_fast.interop.known_net import LOG_MAPS, WRAPPERS, KnownNet, Layer, qualified
from pyglow_fast.nets.traits import is_altered
from pyglow_fast.reference import KERNEL_SIZES, MAX_LAYERS, Activation, ChainSpec, sides

__all__ = ["KnownNet", "recognised", "run"]

_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_KEEPS_SIZE = (
    f"a convolution of kernel sizes {KERNEL_SIZES}, stride 1 and one group that zeros, as many on each side, "
    "keep in size, with the channels of the one before it"
)
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
# Each gives None where its parameter is one that the executor does not have.
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.ReLU: lambda module: Activation(),
    nn.LeakyReLU: lambda module: _leaky(float(module.negative_slope)),
    nn.SiLU: lambda module: Activation("silu"),
    nn.GELU: lambda module: Activation(_GELUS[module.approximate]),
    nn.ELU: lambda module: Activation("elu", float(module.alpha)) if 0.0 < module.alpha < float("inf") else None,
    nn.Tanh: lambda module: Activation("tanh"),
    nn.Sigmoid: lambda module: Activation("sigmoid"),
}


def _leaky(slope: float) -> Activation | None:
    if slope == 0.0:  # which the executor knows as such
        return Activation()
    return Activation("leaky_relu", slope) if 0.0 < slope <= 1.0 else None


def of_torch(module: nn.Module) -> Layer | None:
    """Read a convolution of torch's own, with no map behind it; None of another module."""
    return Layer(module) if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) else None


def recognised(net: nn.Module, layer_of: Callable[[nn.Module], Layer | None] = of_torch) -> KnownNet | str:
    """Read a net as the executor takes it, or say why it does not: which module, by name, is none that it computes.

    layer_of: reads a module as a layer, or says by None that it is none.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks on all modules: expected none"
    layers: list[Layer] = []
    activations: list[Activation] = []  # behind each layer but the last
    activation: Activation | None = None  # behind the layer that was read last
    pads: list[nn.Module] = []  # likewise
    for name, module in _flat(net, ""):
        kind, layer = type(module), layer_of(module)
        behind = bool(layers) and activation is None and not pads  # right behind a convolution
        if is_altered(module):
            return _shown(name, module, "none with hooks or a forward of its own")
        if layer is not None:
            if len(layers) == MAX_LAYERS:
                return _shown(name, module, f"at most {MAX_LAYERS} convolutions")
            if not _fits(layer, layers[-1:], pads):
                return _shown(name, module, _KEEPS_SIZE)
            if layers:
                activations.append(activation or Activation("none"))
            layers.append(layer)
            activation, pads = None, []
        elif kind in _PADS:
            pads.append(module)
        elif behind and qualified(kind) in LOG_MAPS and layers[-1].read_map is None:
            read_map = partial(LOG_MAPS[qualified(kind)], module, len(layers[-1].kernel_size))
            layers[-1] = Layer(layers[-1].conv, read_map)
        elif behind and kind in ACTIVATIONS:
            activation = ACTIVATIONS[kind](module)
            if activation is None:
                return _shown(name, module, "another slope or alpha")
        else:
            return _shown(name, module, "a layer, map per channel or activation that our executor computes here")
    if not layers or activation is not None or pads:
        return _shown("", net, "a chain that ends in a convolution")
    dilations = tuple(layer.conv.dilation for layer in layers)
    return KnownNet(tuple(layers), ChainSpec(tuple(activations), dilations))


def _shown(name: str, module: nn.Module, expected: str) -> str:
    inside = ", ".join(sorted({type(child).__name__ for child in module.children()}))
    shown = f"{type(module).__name__}({module.extra_repr()})" + (f" over {inside}" if inside else "")
    return f"{name}: {shown}: expected {expected}" if name else f"{shown}: expected {expected}"


def _flat(net: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a chain with their names, in order; of altered containers the container itself."""
    inside = f"{name}." if name else ""
    if type(net) is nn.Sequential and not is_altered(net):
        for key, child in net._modules.items():  # named_children gives what is there twice once
            assert child is not None
            yield from _flat(child, inside + key)
    elif qualified(type(net)) in WRAPPERS and not is_altered(net):
        key = WRAPPERS[qualified(type(net))]
        yield from _flat(net.get_submodule(key), inside + key)
    elif type(net) is not nn.Identity or is_altered(net):
        yield name, net


def _fits(layer: Layer, before: Sequence[Layer], pads: Sequence[Any]) -> bool:
    """Whether a convolution, behind zeros, gives as many positions as it gets, and takes what the one before gives."""
    conv, kernel = layer.conv, layer.kernel_size
    if any(len(last.kernel_size) != len(kernel) or last.widths[1] != layer.widths[0] for last in before):
        return False
    expected = sides(kernel, conv.dilation)
    own = conv.padding
    if isinstance(own, str):
        own = expected if own == "same" else (0,) * len(kernel)
    if any(len(pad.padding) != 2 * len(kernel) or min(pad.padding) < 0 for pad in pads):
        return False
    # The numbers of a pad begin with the last dimension: left, right, left, right.
    for first in (0, 1):
        if tuple(map(sum, zip(own, *(pad.padding[first::2][::-1] for pad in pads), strict=True))) != expected:
            return False
    plain = set(conv.stride) == {1} and conv.groups == 1 and set(kernel) <= set(KERNEL_SIZES)
    return plain and (conv.padding_mode == "zeros" or not any(own))


def run(
    net: nn.Module,
    x: Tensor,
    output_map: Callable[[Tensor, int], Tensor] | None = None,
    cond: Tensor | None = None,
    layer_of: Callable[[nn.Module], Layer | None] = of_torch,
) -> Tensor:
    """Compute net(x), or net([x, cond]) of the channels of both, by the executor where it knows the net and takes x.

    Where the executor would be slower the net is computed by the library's convolutions, which pad by themselves.
    ``output_map(values, dim)`` is a linear map of the output channels, which are dimension ``dim`` of ``values``: the
    result is then output_map(net(x), 1). Of a recognised net the last weights are mapped instead, so that no pass over
    the output is needed.

    Args:
        net: of a library.
        x: (N, C, *spatial), which a net that is not recognised may write to.
        output_map: see above.
        cond: (N, C_c, *spatial), or None.
        layer_of: see :func:`recognised`.
    """
    known = recognised(net, layer_of) if functional.net_as_products(x) else ""
    found = None if isinstance(known, str) or not _takes(known, x, cond) else known.weights_and_biases()
    if found is None or isinstance(known, str) or any(tensor.dtype != x.dtype for part in found for tensor in part):
        out: Tensor = net(x if cond is None else torch.cat([x, cond], dim=1))
        return out if output_map is None else output_map(out, 1)
    weights, biases = found
    if output_map is not None:
        weights[-1], biases[-1] = output_map(weights[-1], 0), output_map(biases[-1], 0)
    compute = functional.net_chain if known.pays(x) else reference.net_chain
    return compute(x, weights, biases, known.spec, cond=cond)


def _takes(known: KnownNet, x: Tensor, cond: Tensor | None) -> bool:
    """Whether x, with cond beside it, has the net's dimensions and channels."""
    channels = x.shape[1] + (0 if cond is None else cond.shape[1])
    return x.dim() == known.dims + 2 and channels == known.in_channels
