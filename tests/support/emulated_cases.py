"""The cases that the emulated CUDA kernels are tested on, and what the reference gives for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast.reference import ORDERS, CouplingSpec
from support.emulator import LAYOUTS

DTYPES = [torch.float32, torch.float64]
# (N, C, H, W). H is not W, H * W no multiple of a vector, a warp or a block unless said.
SHAPES = [
    (2, 2, 3, 5),
    (1, 3, 7, 9),
    (3, 5, 4, 6),  # whole vectors
    (2, 12, 11, 13),
    (1, 12, 8, 20),  # whole vectors and several tiles
    (5, 17, 1, 1),
    (7, 32, 1, 2),
    (2, 48, 5, 7),
    (1, 96, 3, 4),
    (2, 100, 2, 3),
    (1, 136, 6, 7),  # more channels than a block takes
    (1, 200, 4, 10),
    (0, 6, 3, 5),
    (2, 6, 0, 5),
]
MAPS = {
    "additive": CouplingSpec(coupling="additive"),
    "sigmoid": CouplingSpec(),
    "sigmoid_eps": CouplingSpec(bias=0.5, eps=0.1),
    "sigmoid_factor": CouplingSpec(bias=0.0, factor=2.0),
    "sigmoid_factor_eps": CouplingSpec(bias=0.5, eps=0.1, factor=0.7),
    "exp": CouplingSpec(scale_map="exp"),
    "tanh": CouplingSpec(scale_map="tanh", clamp=1.5),
    "atan": CouplingSpec(scale_map="atan", clamp=1.9),
}
SPECS = {
    f"{name}-{order}": spec._replace(order=order)
    for name, spec in MAPS.items()
    for order in (ORDERS if spec.coupling == "affine" else ORDERS[:1])
}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
# Small grids are cut further for a large GPU, not for one of a single multiprocessor.
cuts = pytest.mark.parametrize("multiprocessors", [1, 132], ids=["wide", "narrow"])
directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def flat(shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
    return shape[0], shape[1], shape[2] * shape[3]


def mix_case(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a state x, a matrix M and an offset c."""
    c = shape[1]
    return torch.randn(shape, dtype=dtype), torch.randn(c, c, dtype=dtype) / c**0.5, torch.randn(c, dtype=dtype)


def net_channels(channels: int, spec: CouplingSpec) -> int:
    return (channels - channels // 2) * (1 if spec.coupling == "additive" else 2)


def coupling_case(shape: tuple[int, int, int], spec: CouplingSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw x and the net's output."""
    n, c, p = shape
    return torch.randn(n, c, p, dtype=dtype), torch.randn(n, net_channels(c, spec), p, dtype=dtype)


def coupling_reference(x: Tensor, net_out: Tensor, spec: CouplingSpec, inverse: bool) -> tuple[Tensor, Tensor]:
    return (reference.coupling_inverse if inverse else reference.coupling)(x, net_out, spec)


def coupling_gradients(
    x: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, spec: CouplingSpec, inverse: bool
) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, net_out)]
    out, log_det = coupling_reference(*leaves, spec, inverse)
    # The additive coupling's log_det is a constant.
    objective = (out * grad_out).sum() + (log_det * grad_log_det).sum()
    return torch.autograd.grad(objective, leaves)
