"""nflows' layers beside ours, with the same random weights: what the tests of pyglow_fast.interop.nflows compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nflows.transforms as theirs
import torch
from nflows.nn import nets
from torch import Tensor, nn

from pyglow_fast.interop.nflows import transforms as ours
from support.helpers import assert_close, assert_kernel_close

Build = Callable[[Any], nn.Module]  # from nflows.transforms or what stands in for it
IMAGES, VECTORS = (3, 6, 4, 5), (7, 6)
CONTEXT = 3
CONDITION = 10.0  # of the maps here


class ConvNet(nn.Sequential):
    """The net that our executor knows, of a class that takes a context, as a user of nflows writes it."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 8) -> None:
        first, second = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(hidden, outputs, 3, padding=1))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(inputs)


def residual_conv_net(inputs: int, outputs: int) -> nn.Module:
    return nets.ConvResidualNet(inputs, outputs, hidden_channels=8, num_blocks=1)


def residual_conv_net_with_context(inputs: int, outputs: int) -> nn.Module:
    return nets.ConvResidualNet(inputs, outputs, hidden_channels=8, context_channels=CONTEXT, num_blocks=1)


def residual_net(inputs: int, outputs: int) -> nn.Module:
    return nets.ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1)


def residual_net_with_context(inputs: int, outputs: int) -> nn.Module:
    return nets.ResidualNet(inputs, outputs, hidden_features=8, context_features=CONTEXT, num_blocks=1)


def randomise(layer: nn.Module, seed: int = 3) -> nn.Module:
    """Parameters that are not those of a fresh layer, and no initialisation left to do; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for part in layer.modules():
            if isinstance(part, theirs.ActNorm):
                part.initialized.fill_(True)
    return layer


def pair(build: Build, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A layer of nflows and ours, from the same draws and with the same random parameters."""
    layers = []
    for library in (theirs, ours):
        torch.manual_seed(5)
        layers.append(randomise(build(library)).to(dtype))
    return layers[0], layers[1]


def image_or_vector_context(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A context for inputs of this shape."""
    return torch.randn(shape[0], CONTEXT, *shape[2:], dtype=dtype)


def outcome(layer: nn.Module, x: Tensor, context: Tensor | None = None) -> dict[str, Tensor]:
    """Forward and inverse of x, and the gradients of both, by name."""
    results: dict[str, Tensor] = {}
    for name, function in (("forward", layer.forward), ("inverse", layer.inverse)):
        leaf = x.detach().clone().requires_grad_()
        outputs, logabsdet = function(leaf, context)
        assert logabsdet.shape == (x.shape[0],)
        assert outputs.dtype == logabsdet.dtype == x.dtype
        results[name], results[f"{name} logabsdet"] = outputs.detach(), logabsdet.detach()
        weights = torch.linspace(0.3, 1.7, outputs.numel(), dtype=x.dtype).view(outputs.shape)
        per_sample = torch.linspace(-1.0, 1.3, x.shape[0], dtype=x.dtype)
        objective = (weights * outputs).sum() + (per_sample * logabsdet).sum()
        names, parameters = zip(("inputs", leaf), *layer.named_parameters(), strict=True)
        gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
        for parameter_name, parameter, gradient in zip(names, parameters, gradients, strict=True):
            value = torch.zeros_like(parameter) if gradient is None else gradient
            results[f"{name} gradient of {parameter_name}"] = value
    return results


def assert_same(
    their_layer: nn.Module, our_layer: nn.Module, x: Tensor, context: Tensor | None = None, condition: float = CONDITION
) -> None:
    """Outputs, log-dets and gradients in both directions are equal, in float64 to rounding."""
    expected, found = outcome(their_layer, x, context), outcome(our_layer, x, context)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # per batch: a gradient of a parameter is a sum over samples and positions
        assert_close(found[name].flatten().unsqueeze(0), value.flatten().unsqueeze(0), condition)


def assert_as_precise(build: Build, shape: tuple[int, ...], context: bool = False) -> None:
    """Compare errors in float32: ours is at most twice that of nflows, both against nflows in float64."""
    exact, _ = pair(build)
    their_layer, our_layer = pair(build, torch.float32)
    x = torch.randn(shape, dtype=torch.float64)
    given = image_or_vector_context(shape) if context else None
    single = None if given is None else given.float()
    truth = outcome(exact, x.float().double(), None if single is None else single.double())
    plain, found = outcome(their_layer, x.float(), single), outcome(our_layer, x.float(), single)
    for name, value in truth.items():
        assert_kernel_close(found[name], plain[name], value)
