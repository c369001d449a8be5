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
from pyglow_fast._core.torch_private import has_global_hook
from pyglow_fast._core.tracing import is_altered
from pyglow_fast.interop.known_net import LOG_MAPS, WRAPPERS, KnownNet, Layer, qualified
from pyglow_fast.interop.probing import chain_of
from pyglow_fast.nets.chain import Chain, Outputs
from pyglow_fast.nets.traits import may_write
from pyglow_fast.reference import KERNEL_SIZES, MAX_LAYERS, Activation, ChainSpec, sides

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
    if has_global_hook():
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
        yield from _flat(net.get_submodule("net"), inside + "net")
    elif type(net) is not nn.Identity or is_altered(net):
        yield name, net


def _fits(layer: Layer, before: Sequence[Layer], pads: Sequence[Any]) -> bool:
    """Tell whether a convolution, padded with zeros, keeps the number of positions and takes the channels before it."""
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


class Net(nn.Module):
    """A library's net as the net of a coupling of ours: (N, kept, *spatial), cond -> shift, then raw scale.

    Where the executor would be slower than the library's convolutions, which pad by themselves, these compute it.

    Args:
        net: the library's own module, called with the kept channels and the condition as one tensor.
        order: a linear map (values, dim) of the output channels, which are dimension ``dim`` of values, into the order
            of the coupling: all shifts, then all raw scales. Of a recognised net the last weights are mapped instead,
            so that no pass over the output is needed.
        whole: a sample is not to be cut into strips.

    Attributes:
        layer_of: see :func:`recognised`. A net whose layers are of other classes than torch's is run by probes too.
    """

    cond_channels = 0
    layer_of = staticmethod(of_torch)

    def __init__(
        self, net: nn.Module, order: Callable[[Tensor, int], Tensor] | None = None, whole: bool = False
    ) -> None:
        super().__init__()
        self.net, self.order, self.whole_samples = net, order, whole

    def known(self) -> KnownNet | str:
        """The net as the executor takes it, or why it runs as it is."""
        return recognised(self.net, self.layer_of)

    def chain(self, x: Tensor) -> Chain | None:
        """The net as a chain of layers for states like x, None where the library's layers are faster or not known."""
        known = self.known()
        if isinstance(known, str) or known.dims != x.dim() - 2 or not known.pays(x):
            return None
        outputs = Outputs() if self.order is None else self.order
        # The scales are left to the run, so that nothing of the size of a weight is made here, but of an order's.
        layers = known.tensors(folds=False, folds_last=not isinstance(outputs, Outputs))
        if layers is None:
            return None
        powers = tuple(float(len(own) - 2) for own in layers)
        if isinstance(outputs, Outputs):
            return Chain([tensor for own in layers for tensor in own], powers, known.spec, outputs)
        layers[-1] = [outputs(tensor, 0) for tensor in layers[-1]]
        return Chain([tensor for own in layers for tensor in own], powers, known.spec)

    @property
    def halo(self) -> int | None:
        """The number of positions to each side that an output depends on; None where it is not known: see traits."""
        if self.whole_samples:
            return None
        known = self.known()
        stated: int | None = getattr(self.net, "halo", None)
        return stated if isinstance(known, str) else known.halo

    @property
    def bytes_per_position(self) -> Callable[[int], int] | None:
        """The function by which the net states the bytes of activations of a position; None if it states none."""
        stated: Callable[[int], int] | None = getattr(self.net, "bytes_per_position", None)
        return stated

    @property
    def writes_to_input(self) -> bool:
        """Whether the net may write to its inputs; a net that is recognised does not."""
        return isinstance(self.known(), str) and may_write(self.net)

    def as_it_is(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Call the library's net."""
        out: Tensor = self.net(x1 if cond is None else torch.cat([x1, cond], dim=1))
        return out

    def forward(self, x1: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map the kept channels and the condition to shift and raw scale (or shift alone)."""
        order, cond = self.order, None if cond is None else cond.to(x1.dtype)
        known = self.known() if functional.net_by_kernels(x1) else ""
        layers = None if isinstance(known, str) or not known.takes(x1, cond) else known.tensors(folds=True)
        if layers is None or isinstance(known, str) or any(one.dtype != x1.dtype for own in layers for one in own):
            out = self.as_it_is(x1, cond)
            out = out if order is None else order(out, 1)
        else:
            if order is not None:
                layers[-1] = [order(tensor, 0) for tensor in layers[-1]]
            weights, biases = map(list, zip(*layers, strict=True))
            compute = functional.net_chain if known.pays(x1) else reference.net_chain
            out = compute(x1, weights, biases, known.spec, cond=cond)
        return order.bounded(out) if isinstance(order, Outputs) else out


class CalledWithContext(Net):
    """A net that is called as net(x1, context), which no Sequential can be: its forward is read off a call of it."""

    writes_to_input = False  # it gives its net a copy itself

    def known(self) -> KnownNet | str:
        """The chain of layers that the net's forward is without a context, or why it runs as it is."""
        chain = chain_of(self.net)
        return recognised(self.net if chain is None else chain)

    def as_it_is(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Call the library's net, with a copy."""
        out: Tensor = self.net(x1.clone(memory_format=torch.contiguous_format), cond)
        return out

    def forward(self, x1: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map the kept channels and the context to shift and raw scale (or shift alone)."""
        return super().forward(x1) if cond is None else self.as_it_is(x1, cond)
