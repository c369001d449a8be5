"""Reads what a flow step of chaiyujin's code is made of off its attributes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop.indices import indices_on
from pyglow_fast.interop.known_net import KnownNet, Layer, widths
from pyglow_fast.layers import AffineInjector, Coupling
from pyglow_fast.layers.flow_step import stack_maps
from pyglow_fast.reference import COUPLING_NETS, CouplingSpec, fold_actnorm, full_precision, plu_weight
from pyglow_fast.reversible.steps import ChannelMap

_CALL = ["self", "input", "logdet", "reverse"]
_PERMUTATIONS = ("invconv", "shuffle", "reverse")
_FACTOR = 3.0  # what log_gain is multiplied by in the nets here
LEAST_RATIO = 8  # of the sides of a 3x3 convolution: at 512 to 96 and at 320 to 64 channels the library is as fast


class UnknownError(Exception):
    """Raised when a step is not as expected; the message says in what."""


class SharedNet(nn.Module):
    """A step's net as the net of a Coupling: parameters shared, actnorms folded, all shifts before all raw scales.

    Args:
        net: a Sequential of convolution, ReLU, convolution, ReLU, convolution.
        is_interleaved: whether its output channels are shift, raw, shift, raw, ... rather than all shifts, then all raw
            scales.
    """

    writes_to_input = False

    def __init__(self, net: nn.Sequential, is_interleaved: bool) -> None:
        super().__init__()
        self.net, self.is_interleaved = net, is_interleaved

    @property
    def known(self) -> KnownNet:
        """The chain of the net's three convolutions, without actnorms."""
        return KnownNet(tuple(Layer(self.net[i], [], []) for i in (0, 2, 4)), COUPLING_NETS[2])

    @property
    def pays(self) -> bool:
        """Whether matrix products are faster than the library's convolutions: those with taps are wide to narrow."""
        sides = [sorted(widths(self.net[i])) for i in (0, 4)]
        return all(wide >= LEAST_RATIO * narrow for narrow, wide in sides)

    @property
    def halo(self) -> int:
        """How many positions to each side an output depends on."""
        return max(self.known.reach)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map x (N, C1, H, W) and cond (N, C_c, H, W), or None, to shift and raw scale (or shift alone)."""
        if (cond is None and not x.requires_grad and torch.is_grad_enabled()) or not self.pays:
            # The library leaves out a gradient of x that nobody wants; the ops here would compute it.
            out: Tensor = self.net(x if cond is None else torch.cat([x, cond], dim=1))
            return torch.cat([out[:, 0::2], out[:, 1::2]], dim=1) if self.is_interleaved else out
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for i in (0, 2):
            conv: Any = self.net[i]
            weight, bias = conv.weight, conv.bias
            if bias is None:
                scale = conv.actnorm.logs.exp().flatten()
                weight, bias = weight * scale[:, None, None, None], conv.actnorm.bias.flatten() * scale
            weights.append(weight)
            biases.append(bias)
        last: Any = self.net[4]
        values = [last.weight, last.bias, last.logs * (last.logscale_factor / _FACTOR)]
        if self.is_interleaved:
            values = [torch.cat([value[0::2], value[1::2]]) for value in values]
        weight, bias, log_gain = values
        return functional.net_chain(x, [*weights, weight], [*biases, bias], COUPLING_NETS[2], log_gain, cond)


@dataclass(frozen=True)
class Parts:
    """The couplings of a step, which have its nets, and the modules that they were read from.

    Attributes:
        couplings: those that there are, in the direction of data to latent: the injector, then the coupling.
        modules: actnorm, permutation and nets, which must still be the step's.
        actnorms: all actnorms, those in the nets too.
        needs_features: whether the nets read features.
    """

    couplings: tuple[Coupling, ...]
    modules: tuple[nn.Module, ...]
    actnorms: tuple[Any, ...]
    needs_features: bool

    @property
    def pays(self) -> bool:
        """Whether matrix products are faster than the library's convolutions in every net."""
        return all(cast(SharedNet, coupling.net).pays for coupling in self.couplings)

    def are_of(self, step: Any) -> bool:
        """Whether the step has these modules now."""
        found = modules_of(step)
        return len(found) == len(self.modules) and all(a is b for a, b in zip(found, self.modules, strict=True))


def looks_like(module: nn.Module) -> bool:
    """Whether a module has the attributes of a flow step like chaiyujin's."""
    actnorm = getattr(module, "actnorm", None)
    has_actnorm = isinstance(actnorm, nn.Module) and all(hasattr(actnorm, name) for name in ("bias", "logs", "inited"))
    names = (getattr(module, name, None) for name in ("flow_permutation", "flow_coupling"))
    return has_actnorm and all(isinstance(name, str) for name in names)


def modules_of(step: Any) -> list[nn.Module]:
    """Find a step's actnorm, permutation and nets."""
    found = [step.actnorm, getattr(step, step.flow_permutation, None)]
    if step.flow_coupling == "CondAffineSeparatedAndCond":
        found += [step.affine.fFeatures, step.affine.fAffine]
    elif step.flow_coupling in ("affine", "additive"):
        found.append(step.f)
    return found


def read(step: Any) -> Parts:
    """Read the parts of a step that looks like one of chaiyujin's.

    Raises:
        UnknownError: something in it is not as we know it.
    """
    names = list(inspect.signature(type(step).forward).parameters)
    _expect(names[:4] == _CALL and names[4:] in ([], ["rrdbResults"]), f"its forward takes {', '.join(names[1:])}")
    _expect(step.flow_permutation in _PERMUTATIONS, f"flow_permutation {step.flow_permutation!r}")
    channels = step.actnorm.bias.numel()
    coupling = step.flow_coupling
    couplings: list[Coupling] = []
    if coupling == "CondAffineSeparatedAndCond":
        affine = step.affine
        _expect(channels % 2 == 0 and affine.channels_for_nn == channels // 2, f"{channels} channels not halved")
        spec = CouplingSpec("affine", eps=float(affine.affine_eps))
        couplings.append(AffineInjector(channels, net=_net(affine.fFeatures, "fFeatures", True), spec=spec))
        couplings.append(Coupling(_net(affine.fAffine, "fAffine", True), *spec))
    elif coupling in ("affine", "additive"):
        _expect(channels % 2 == 0, f"{channels} channels")
        couplings.append(Coupling(_net(step.f, "f", coupling == "affine"), coupling))
    else:
        _expect(coupling == "noCoupling", f"flow_coupling {coupling!r}")
    modules = tuple(modules_of(step))
    _expect(all(isinstance(module, nn.Module) for module in modules), f"no {step.flow_permutation}")
    actnorms = tuple(module for module in step.modules() if hasattr(module, "inited"))
    return Parts(tuple(couplings), modules, actnorms, coupling == "CondAffineSeparatedAndCond")


def _expect(condition: bool, found: str) -> None:
    if not condition:
        raise UnknownError(found)


def _net(net: nn.Module, name: str, is_interleaved: bool) -> SharedNet:
    layers: list[Any] = list(net.children())
    known = type(net) is nn.Sequential and len(layers) == 5 and all(type(layers[i]) is nn.ReLU for i in (1, 3))
    convs = layers[::2]
    known = known and all(isinstance(conv, nn.Conv2d) for conv in convs)
    _expect(known, f"{name} is no chain of three convolutions with ReLUs between")
    for conv, size in zip(convs, (3, 1, 3), strict=True):
        shape = (conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups, conv.padding_mode)
        expected = ((size, size), (size // 2, size // 2), (1, 1), (1, 1), 1, "zeros")
        _expect(shape == expected, f"{name} has a convolution with kernel, padding, stride, ... {shape}")
    for conv in convs[:2]:
        _expect(
            (conv.bias is None) == hasattr(conv, "actnorm"), f"{name} has a convolution with bias and actnorm, or none"
        )
    last = convs[2]
    scaled = last.bias is not None and hasattr(last, "logs") and hasattr(last, "logscale_factor")
    _expect(scaled, f"{name} has no scaled convolution at its end")
    assert isinstance(net, nn.Sequential)
    return SharedNet(net, is_interleaved)


def _weight(step: Any) -> tuple[Tensor, Tensor]:
    """W (C, C) of a 1x1 convolution and log|det W|."""
    conv = step.invconv
    if not conv.LU:
        return conv.weight, functional.log_abs_det(conv.weight)
    return plu_weight(conv.p, conv.l, conv.u, conv.log_s, conv.sign_s), conv.log_s.sum()


def channel_map(step: Any) -> ChannelMap:
    """Compute the actnorm and permutation of a step as one map, with the parameters of now."""
    log_scale, bias = step.actnorm.logs.flatten(), step.actnorm.bias.flatten()
    if step.flow_permutation != "invconv":
        indices = getattr(step, step.flow_permutation).indices
        on_device = isinstance(indices, Tensor)
        source = indices.to(bias.device).long() if on_device else indices_on(indices, bias.device)
        return ChannelMap(*functional.gather_actnorm(source, log_scale, bias), log_scale.sum(), source)
    with full_precision(bias):
        weight, log_abs_det = _weight(step)
        matrix, offset = fold_actnorm(weight[None], log_scale[None], bias[None])
    return ChannelMap(matrix[0], offset[0], log_scale.sum() + log_abs_det)


def before_couplings(own: ChannelMap, n_couplings: int) -> ChannelMap:
    """Stack the maps before each coupling of a step: its own before the first, and the identity between."""
    return stack_maps([own, *[ChannelMap.nothing(own.offset)] * (n_couplings - 1)])
