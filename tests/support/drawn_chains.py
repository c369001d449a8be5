"""Random coupling nets of torch's modules, all of which our executor computes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast.reference import KERNEL_SIZES, MAX_LAYERS

CONVOLUTIONS: tuple[Any, ...] = (None, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADS: tuple[Any, ...] = (None, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
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


def _convolution(rng: random.Random, dims: int, before: int, after: int) -> list[nn.Module]:
    """Draw a convolution with padding that keeps the size, written in one of the ways there are."""
    kernel = tuple(rng.choice(KERNEL_SIZES if dims < 3 else (1, 3, 5)) for _ in range(dims))
    dilation = tuple(rng.choice((1, 1, 2)) for _ in range(dims))
    padding = tuple(step * (size // 2) for size, step in zip(kernel, dilation, strict=True))
    style = rng.choice(("numbers", "same", "pad", "both"))
    own: Any = {"numbers": padding, "same": "same", "both": tuple(size // 2 for size in padding)}.get(style, 0)
    mode = "circular" if own == 0 and rng.random() < 0.5 else "zeros"  # of no padding
    bias = rng.random() < 0.7
    conv = CONVOLUTIONS[dims](before, after, kernel, padding=own, dilation=dilation, bias=bias, padding_mode=mode)
    if style in ("numbers", "same"):
        return [conv]
    rest = [size - size // 2 if style == "both" else size for size in padding]
    return [PADS[dims](tuple(size for size in reversed(rest) for _ in range(2))), conv]


def drawn_chain(seed: int, dims: int) -> tuple[nn.Module, Tensor]:
    """A net, and an input, float64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    layers = 1 + seed % MAX_LAYERS
    widths = [rng.randint(1, 5) for _ in range(layers + 1)]
    parts: list[nn.Module] = []
    for layer, (before, after) in enumerate(itertools.pairwise(widths)):
        parts += _convolution(rng, dims, before, after)
        activation = rng.choice(ACTIVATIONS)(rng) if layer < layers - 1 else None
        parts += [] if activation is None else [activation]
    cut = rng.randint(0, len(parts))
    net = nn.Sequential(nn.Sequential(*parts[:cut], nn.Identity()), *parts[cut:])
    spatial = [rng.randint(1, 6) for _ in range(dims)]
    return net.double(), torch.randn(rng.randint(1, 3), widths[0], *spatial, dtype=torch.float64, requires_grad=True)
