"""Random coupling nets of torch's modules, all of which our executor computes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pyglow_fast.reference import KERNEL_SIZES, MAX_LAYERS

CONVOLUTIONS: tuple[Any, ...] = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ZERO_PADS: tuple[Any, ...] = (None, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
CONSTANT_PADS: tuple[Any, ...] = (None, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ACTIVATIONS = (
    lambda rng: None,
    lambda rng: nn.ReLU(inplace=rng.random() < 0.5),
    lambda rng: nn.LeakyReLU(rng.choice((0.0, 0.1, 0.7, 1.0)), inplace=rng.random() < 0.5),
    lambda rng: nn.SiLU(),
    lambda rng: nn.GELU(),
    lambda rng: nn.GELU(approximate="tanh"),
    lambda rng: nn.ELU(rng.choice((0.5, 1.0, 2.0))),
    lambda rng: nn.Tanh(),
    lambda rng: nn.Sigmoid(),
)


class Doubled(nn.Module):
    """A user's parametrization, which counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2.0 * x


def norm_of(dims: int, width: int, affine: bool = True) -> Any:
    """A BatchNorm in evaluation mode that has seen something."""
    norm = NORMS[dims](width, affine=affine, eps=1e-3)
    for name, low, high in (("running_mean", -1.0, 1.0), ("running_var", 0.3, 2.0)):
        nn.init.uniform_(getattr(norm, name), low, high)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm.eval()


def _convolution(rng: random.Random, dims: int, before: int, after: int, small: bool) -> list[nn.Module]:
    """Draw a convolution with padding that keeps the size, written in one of the ways there are."""
    sizes = (1, 1, 1) if small else [rng.choice(KERNEL_SIZES if dims < 3 else (1, 3, 5)) for _ in range(dims)]
    kernel, dilation = tuple(sizes[:dims]), tuple(rng.choice((1, 1, 2)) for _ in range(dims))
    padding = tuple(step * (size // 2) for size, step in zip(kernel, dilation, strict=True))
    style = rng.choice(("numbers", "same", "zero pad", "constant pad", "both"))
    own: Any = {"numbers": padding, "same": "same", "both": tuple(size // 2 for size in padding)}.get(style, 0)
    mode = "circular" if own == 0 and rng.random() < 0.5 else "zeros"  # of no padding
    bias = rng.random() < 0.7
    conv = CONVOLUTIONS[dims](before, after, kernel, padding=own, dilation=dilation, bias=bias, padding_mode=mode)
    if style in ("numbers", "same"):
        return [conv]
    rest = [size - size // 2 if style == "both" else size for size in padding]
    pads = tuple(size for size in reversed(rest) for _ in range(2))
    return [ZERO_PADS[dims](pads) if rng.random() < 0.5 else CONSTANT_PADS[dims](pads, 0.0), conv]


def _layer(rng: random.Random, dims: int, before: int, after: int, small: bool) -> list[nn.Module]:
    parts: list[nn.Module]
    if dims:
        parts = _convolution(rng, dims, before, after, small)
    else:
        parts = [nn.Linear(before, after, bias=rng.random() < 0.7)]
    norm = rng.choice((None, None, "weight norm", "spectral norm", "own"))
    if norm == "weight norm":
        parametrizations.weight_norm(parts[-1])
    elif norm == "spectral norm":
        parametrizations.spectral_norm(parts[-1])
    elif norm == "own":
        parametrize.register_parametrization(parts[-1], "weight", Doubled())
        if parts[-1].bias is not None:
            parametrize.register_parametrization(parts[-1], "bias", Doubled())
    return parts


def drawn_chain(seed: int, dims: int) -> tuple[nn.Module, Tensor]:
    """A net in training mode (but for its norms), and an input, float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers = 1 + seed % MAX_LAYERS
    widths = [rng.randint(1, 5) for _ in range(layers + 1)]
    parts: list[nn.Module] = []
    for layer, (before, after) in enumerate(itertools.pairwise(widths)):
        normed = rng.random() < 0.3
        if normed:  # of the layer's input
            parts.append(norm_of(dims, before, rng.random() < 0.5))
        parts += _layer(rng, dims, before, after, small=normed)
        if rng.random() < 0.4:
            parts.append(norm_of(dims, after, rng.random() < 0.5))
        activation = rng.choice(ACTIVATIONS)(rng) if layer < layers - 1 else None
        parts += [] if activation is None else [activation]
        parts += [nn.Dropout(0.0)] if rng.random() < 0.2 else [nn.Dropout(0.5).eval()] if rng.random() < 0.2 else []
    cut = rng.randint(0, len(parts))
    net = nn.Sequential(nn.Sequential(*parts[:cut], nn.Identity()), *parts[cut:])
    spatial = [rng.randint(1, 6) for _ in range(dims)]
    return net.double(), torch.randn(rng.randint(1, 3), widths[0], *spatial, dtype=torch.float64, requires_grad=True)
