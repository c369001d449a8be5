"""Runs coupling nets of other libraries in this package's executor, if they are chains of layers that it computes.

A net is recognised if it consists of exactly these modules: one to six convolutions (1-d, 2-d or 3-d) that keep the
size by padding with zeros, or linear layers on vectors; an activation or none after each; and maps per channel (a
BatchNorm in evaluation mode, an actnorm of a library), which are folded into the layer next to them. Weights may be
parametrized. A net with anything else (hooks, subclasses, strides, other paddings) runs as it is, and the reason names
the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyglow_fast import functional, reference
from pyglow_fast.coupling_nets import plain_call, traits
from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.known_net import (
    AFFINE_MAPS,
    LAYERS,
    LOG_MAPS,
    NORMS,
    WRAPPERS,
    KnownNet,
    Layer,
    parametrizations,
    plain_type,
    qualified,
    widths,
)
from pyglow_fast.reference import KERNEL_SIZES, MAX_LAYERS, Activation, ChainSpec, activated, sides

__all__ = ["AFFINE_MAPS", "KnownNet", "halo", "recognised", "run"]

_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SIZES = frozenset(KERNEL_SIZES)
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda module: Activation(),
    # Without a slope it is a ReLU, which the executor knows as such.
    nn.LeakyReLU: lambda module: (
        Activation("leaky_relu", float(module.negative_slope)) if module.negative_slope else Activation()
    ),
    nn.SiLU: lambda module: Activation("silu"),
    nn.GELU: lambda module: Activation(_GELUS.get(module.approximate, module.approximate)),
    nn.ELU: lambda module: Activation("elu", float(module.alpha)),
    nn.Tanh: lambda module: Activation("tanh"),
    nn.Sigmoid: lambda module: Activation("sigmoid"),
}


class _UnfitError(Exception):
    """Says what of a net our executor does not compute."""


def _refuse(name: str, module: nn.Module, found: str, expected: str = "") -> NoReturn:
    shown = f"{type(module).__name__}({module.extra_repr()})"
    named = f"{name}: {shown}" if name else shown
    raise _UnfitError(f"{named}{found}" + (f": expected {expected}" if expected else ""))


def recognised(net: nn.Module) -> KnownNet | str:
    """Read a net as the executor takes it, or say why it does not: which module, by name, is unusual in what."""
    if torch.nn.modules.module._has_any_global_hook():
        return "hooks on all modules: expected none"
    reader = _Reader()
    try:
        for name, module in _flat(net, ""):
            reader.read(name, module)
        return reader.result(net)
    except _UnfitError as unfit:
        return str(unfit)


def _flat(net: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a chain with their names, in order."""
    if has_hooks(net):
        _refuse(name, net, " with hooks", "none")
    if "forward" in vars(net) or "_conv_forward" in vars(net):
        _refuse(name, net, " with a forward of its own", "that of its class")
    inside = f"{name}." if name else ""
    if type(net) is nn.Sequential:
        for key, child in net._modules.items():
            assert child is not None
            yield from _flat(child, inside + key)
    elif qualified(type(net)) in WRAPPERS:
        key = WRAPPERS[qualified(type(net))]
        yield from _flat(net.get_submodule(key), inside + key)
    elif type(net) is not nn.Identity:
        yield name, net


class _Reader:
    """Reads the modules of a net in order; each is refused where it comes if it does not fit."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.activations: list[Activation] = []
        self.dilations: list[tuple[int, ...]] = []
        # An activation, maps and pads that wait for the layer that follows; their names are for the message if none
        # follows.
        self.activation: tuple[str, nn.Module, Activation] | None = None
        self.before: list[tuple[str, nn.Module]] = []
        self.pads: list[tuple[str, Any]] = []

    def read(self, name: str, module: nn.Module) -> None:
        """Takes the next module."""
        layer_class = plain_type(module)
        if layer_class in LAYERS:
            self._layer(name, module, LAYERS[layer_class])
        elif layer_class in _PADS:
            self._pad(name, module)
        elif layer_class in _DROPOUTS:
            if module.training and module.p:
                _refuse(name, module, " in training mode", "evaluation mode, or p = 0")
        elif self.pads:
            _refuse(*self.pads[-1], f" before a {type(module).__name__}", "a convolution next")
        elif qualified(layer_class) in AFFINE_MAPS or qualified(layer_class) in LOG_MAPS:
            self._map(name, module)
        elif layer_class in ACTIVATIONS:
            self._activation(name, module, ACTIVATIONS[layer_class](module))
        else:
            children = {type(child).__name__ for key, child in module.named_children() if key != "parametrizations"}
            inside = ", ".join(sorted(children))
            found = f", a net of a class of its own over {inside}" if inside else ""
            _refuse(name, module, found, "a layer, map per channel or activation that our executor computes")

    def _activation(self, name: str, module: nn.Module, activation: Activation) -> None:
        function, parameter = activation
        if not self.layers or self.activation is not None or self.before:
            _refuse(name, module, "", "a layer before each activation")
        if function == "leaky_relu" and not 0.0 <= parameter <= 1.0:
            _refuse(name, module, f", slope {parameter:g}", "0 to 1")
        if function == "elu" and not 0.0 < parameter < float("inf"):
            _refuse(name, module, f", alpha {parameter:g}", "a number above 0")
        if type(module) is nn.GELU and function not in _GELUS.values():
            _refuse(name, module, f", approximate {function!r}", "'none' or 'tanh'")
        self.activation = (name, module, activation)

    def _pad(self, name: str, module: Any) -> None:
        if module.value != 0:
            _refuse(name, module, f", value {module.value}", "0")
        if not all(isinstance(size, int) and size >= 0 for size in module.padding):
            _refuse(name, module, f", padding {module.padding}", "numbers of at least 0")
        self.pads.append((name, module))

    def _map(self, name: str, module: nn.Module) -> None:
        if isinstance(module, _BatchNorm):
            if module.training:
                _refuse(name, module, " in training mode", "evaluation mode")
            if module.running_mean is None or module.running_var is None:
                _refuse(name, module, " without running statistics", "some")
        if not self.layers or self.activation is not None:
            self.before.append((name, module))
            return
        last = self.layers[-1]
        _check_norm(name, module, widths(last.module)[1], len(self.dilations[0]))
        self.layers[-1] = Layer(last.module, last.before, [*last.after, module])

    def _layer(self, name: str, module: Any, dims: int) -> None:
        if len(self.layers) == MAX_LAYERS:
            _refuse(name, module, f", layer {MAX_LAYERS + 1}", f"at most {MAX_LAYERS}")
        if self.dilations and len(self.dilations[0]) != dims:
            what = f"another {type(self.layers[0].module).__name__}"
            _refuse(name, module, f" after layers of {len(self.dilations[0])} spatial dimensions", what)
        width = widths(module)[0]
        if self.layers and widths(self.layers[-1].module)[1] != width:
            _refuse(name, module, f", {width} channels", f"{widths(self.layers[-1].module)[1]}")
        if not dims and self.pads:
            _refuse(*self.pads[-1], f" before a {type(module).__name__}", "a convolution next")
        padding = _check_convolution(name, module, dims, self.pads) if dims else 0
        _check_weights(name, module)
        for map_name, channel_map in self.before:
            if padding:
                _refuse(map_name, channel_map, f" before {name}, which pads", "one without padding, or no map here")
            _check_norm(map_name, channel_map, width, dims)
        if self.layers:
            self.activations.append(Activation("none") if self.activation is None else self.activation[2])
        self.layers.append(Layer(module, [channel_map for _, channel_map in self.before], []))
        self.dilations.append(tuple(module.dilation) if dims else ())
        self.activation, self.before, self.pads = None, [], []

    def result(self, net: nn.Module) -> KnownNet:
        """Gives the net, when all its modules were read."""
        last = self.activation
        if last is not None and (self.before or self.pads or not self.layers):
            _refuse(*last[:2], " after the last layer", "nothing after it")
        for name, module in (*self.before, *self.pads):
            _refuse(name, module, "", "a layer after it")
        if not self.layers:
            _refuse("", net, "", "a convolution or linear layer")
        spec = ChainSpec(tuple(self.activations), tuple(self.dilations))
        return KnownNet(tuple(self.layers), spec, None if last is None else last[2])


def _check_norm(name: str, module: nn.Module, channels: int, dims: int) -> None:
    """Refuse a BatchNorm of another width or for other dimensions than the layer next to it."""
    if isinstance(module, _BatchNorm):
        if dims not in NORMS[plain_type(module)]:
            _refuse(name, module, f" in a net of {dims} spatial dimensions", "a BatchNorm for these")
        if module.num_features != channels:
            _refuse(name, module, f", {module.num_features} channels", f"{channels}")


def _check_weights(name: str, module: Any) -> None:
    """Refuse weights that are not of the size that the layer says, or may not be."""
    computed = parametrizations(module)
    for key, found in computed.items():
        own = all(type(part).__module__ == "torch.nn.utils.parametrizations" for part in found)
        if found.unsafe and not own:
            _refuse(name, module, f", a parametrization of {key} that is 'unsafe'", "one that keeps size and dtype")
    before, after = widths(module)
    kernel: tuple[int, ...] = () if isinstance(module, nn.Linear) else module.kernel_size
    shapes = {"weight": (after, before, *kernel), "bias": (after,)}
    for key, shape in shapes.items():
        value = None if key in computed else getattr(module, key)  # looking at it would compute it, and may change it
        if value is not None and value.shape != shape:
            _refuse(name, module, f", {key} {tuple(value.shape)}", f"{shape}")


def _check_convolution(name: str, conv: Any, dims: int, pads: Sequence[tuple[str, Any]]) -> int:
    """Refuse a convolution, or tell the most zeros to a side that it and the pads before it add."""
    if conv.stride != (1,) * dims:
        _refuse(name, conv, f", stride {conv.stride}", "1")
    if conv.groups != 1:
        _refuse(name, conv, f", groups {conv.groups}", "1")
    if not _SIZES.issuperset(conv.kernel_size):
        _refuse(name, conv, f", kernel size {conv.kernel_size}", f"sizes of {KERNEL_SIZES}")
    if not isinstance(conv.dilation, tuple) or len(conv.dilation) != dims:  # set by hand: torch takes a number too
        _refuse(name, conv, f", dilation {conv.dilation}", f"{dims} numbers")
    expected = sides(conv.kernel_size, conv.dilation)
    own = conv.padding
    if isinstance(own, str):
        own = expected if own == "same" else (0,) * dims
    if not isinstance(own, tuple) or len(own) != dims or min(own) < 0:
        _refuse(name, conv, f", padding {own}", f"{dims} numbers of at least 0")
    if conv.padding_mode != "zeros" and any(own):
        _refuse(name, conv, f", padding mode {conv.padding_mode!r}", "'zeros'")
    left, right = list(own), list(own)
    for pad_name, pad in pads:  # whose numbers begin with the last dimension: left, right, left, right
        pairs = list(zip(pad.padding[::2], pad.padding[1::2], strict=True))
        if len(pairs) > dims:
            _refuse(pad_name, pad, f" before a {type(conv).__name__}", f"padding of {dims} dimensions")
        for dim, (first, last) in enumerate(pairs, start=1):
            left[-dim] += first
            right[-dim] += last
    if (*left, *right) != (*expected, *expected):
        both = tuple(left) if left == right else tuple(zip(left, right, strict=True))
        _refuse(name, conv, f", in all padded by {both}", f"{expected}")
    return max(expected)


def halo(net: nn.Module) -> int | None:
    """Compute how many positions to each side an output depends on, the most of any dimension; None if not known.

    A net that is not recognised may state its halo. Of a net with parametrized weights it is not known, so that the net
    is not called more often than it would be: a spectral norm changes when it is called.
    """
    known = recognised(net)
    if isinstance(known, KnownNet):
        return None if known.is_parametrized else max(known.reach, default=0)
    stated: int | None = getattr(net, "halo", None)
    return stated


def bytes_per_position(net: nn.Module) -> Callable[[int], int] | None:
    """Find the function of a number's bytes by which a net states the bytes of a position; None if it states none."""
    stated: Callable[[int], int] | None = getattr(net, "bytes_per_position", None)
    return stated


def may_write(net: nn.Module) -> bool:
    """Tells whether a net may write to its input: one that is recognised begins with what makes a tensor of its own."""
    return not isinstance(recognised(net), KnownNet) and traits.may_write(net)


def run(
    net: nn.Module,
    x: Tensor,
    output_map: Callable[[Tensor, int], Tensor] | None = None,
    cond: Tensor | None = None,
    copies: bool = True,
) -> Tensor:
    """Compute net(x), or net([x, cond]) of the channels of both, by the executor where it knows the net and takes x.

    Where the executor knows the net but would be slower, it is computed by the library's convolutions, which pad by
    themselves. ``output_map(values, dim)`` is a linear map of the output channels, which are dimension ``dim`` of
    ``values``: the result is then output_map(net(x), 1). For a recognised net the last weights are mapped instead, so
    that no pass over the output is needed (unless the net ends in an activation). A net that may write to its input
    gets a copy; without ``copies`` the caller has seen to that.
    """
    known = _known(net, x, cond)
    found = None if known is None else known.weights_and_biases()
    if known is None or found is None:
        given = x if cond is None else torch.cat([x, cond], dim=1)
        out: Tensor = plain_call(net)(given, None) if copies and cond is None else net(given)
        return out if output_map is None else output_map(out, 1)
    weights, biases = found
    if known.last is None and output_map is not None:
        weights[-1], biases[-1] = output_map(weights[-1], 0), output_map(biases[-1], 0)
    compute = functional.net_chain if known.pays(x) else reference.net_chain
    out = compute(x, weights, biases, known.spec, cond=cond)
    if known.last is None:
        return out
    out = activated(out, known.last)
    return out if output_map is None else output_map(out, 1)


def _known(net: nn.Module, x: Tensor, cond: Tensor | None) -> KnownNet | None:
    """Gives the net, if it is recognised and not to be called as it is: on vectors that is where ours is slower."""
    if not functional.net_as_products(x):
        return None
    known = recognised(net)
    if not isinstance(known, KnownNet) or not known.takes(x, cond) or (known.dims == 0 and not known.pays(x)):
        return None
    return known
