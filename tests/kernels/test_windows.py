"""What GPUs compute coupling nets with besides products: patches, their transpose, which sums taps, and relus."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from kernels.kernel_cases import HALVES, Kernels, layouts, option
from support.covering import pairs
from torch import Tensor, float32, float64

from pyglow_fast import reference
from pyglow_fast.reference import ChainSpec

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
Types = tuple[torch.dtype, torch.dtype]
# (N, C, *spatial), kernel, dilations: one tile and several along both sides, ragged ones, samples across tiles, taps
# beyond the extent, no sample, channel or position.
WINDOWS: list[Window] = [
    ((2, 3, 4, 5), (3, 3), (1, 1)),
    ((3, 6, 9, 11), (3, 1), (2, 1)),
    ((1, 40, 5, 3), (3, 5), (1, 3)),
    ((5, 7, 1, 2), (7, 3), (1, 9)),
    ((2, 5, 37), (3,), (4,)),
    ((2, 4, 3, 4, 5), (3, 1, 3), (1, 1, 2)),
    ((70, 9), (), ()),
    ((0, 3, 4, 4), (3, 3), (1, 1)),
    ((2, 0, 4, 4), (3, 3), (1, 1)),
    ((2, 3, 0, 4), (3, 3), (1, 1)),
]
TYPES = [(float64, float64), *((a, b) for a in (float32, *HALVES) for b in (float32, *HALVES))]


def seen(x: Tensor, kernel: Sequence[int], dilations: tuple[int, ...], backward: bool) -> Tensor:
    """(N, P, C taps): x at each position with the shift of each tap, or against it; zero outside. In float64."""
    used = x.shape[1] * math.prod(kernel)
    weight = torch.eye(used, dtype=float64).reshape(used, x.shape[1], *kernel)
    weight = weight.flip([*range(2, weight.dim())]) if backward else weight
    out = reference.net_chain(x.double(), [weight], [torch.zeros(used, dtype=float64)], ChainSpec((), (dilations,)))
    return out.reshape(*out.shape[:2], math.prod(out.shape[2:])).mT


@pairs(option("window", WINDOWS), option("types", TYPES), layouts, option("backward", [False, True]))
def test_patches(kernels: Kernels, window: Window, types: Types, layout: str, backward: bool) -> None:
    """Moves of values, rounded once where the type is narrower, with zeros up to 16 bytes; and sums of each channel."""
    (shape, kernel, dilations), (given, wanted) = window, types
    x = kernels.randn(shape, float64, layout).mul_(4).round_().to(given)
    rows, sums = (found.cpu() for found in kernels("patches", x, kernel, dilations, backward, wanted))
    used, unit = shape[1] * math.prod(kernel), 16 // wanted.itemsize
    assert rows.shape[1] == -(-used // unit) * unit
    expected = seen(x.cpu(), kernel, dilations, backward).flatten(0, 1) if x.numel() else rows[:, :used]
    assert torch.equal(rows[:, :used], expected.to(wanted))
    assert not rows[:, used:].any()
    if backward and x.numel():
        parts = x.cpu().double().movedim(1, -1).reshape(-1, shape[1]).split(64)
        assert torch.equal(sums.double(), torch.stack([part.sum(0) for part in parts]))


@pairs(
    option("window", WINDOWS),
    option("types", TYPES),
    option("bias", [False, True]),
    option("spare", [0, 3]),
    option("backward", [False, True]),
)
def test_tap_sums(kernels: Kernels, window: Window, types: Types, bias: bool, spare: int, backward: bool) -> None:
    """The transpose of patches, of whole numbers whose sums are exact; columns behind those are not read."""
    (shape, kernel, dilations), (given, wanted) = window, types
    taps = math.prod(kernel)
    positions = math.prod(shape[2:]) if math.prod(shape) else 0
    rows = kernels.randn((shape[0] * positions, shape[1] * taps + spare), float64).mul_(2).round_().to(given)
    rows[:, shape[1] * taps :] = math.nan
    own = kernels.randn(shape[1:2], float64).mul_(2).round_().to(given) if bias else None
    (found,) = kernels("tap_sums", rows, own, shape, kernel, dilations, backward, wanted)
    expected = torch.zeros(shape, dtype=float64)
    if expected.numel():
        values = rows[:, : shape[1] * taps].cpu().double().reshape(shape[0], positions, shape[1] * taps)
        leaf = expected.clone().requires_grad_()
        (expected,) = torch.autograd.grad(seen(leaf, kernel, dilations, not backward), leaf, values)
    if own is not None:
        expected = expected + own.cpu().double().reshape(-1, *[1] * len(kernel))
    assert found.shape == shape
    assert torch.equal(found.cpu(), expected.to(wanted))


@pairs(
    option("sizes", [(1, 1), (70, 37), (300, 12), (9000, 8), (130, 520), (0, 4), (5, 0)]),
    option("dtype", [float64, float32, *HALVES]),
)
def test_relu_backward(kernels: Kernels, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """As torch's, with the sums of all rows in parts; of NaN the gradient is kept."""
    grad, h = (kernels.randn(sizes, float64).mul_(4).round_().to(dtype) for _ in range(2))
    if h.numel():
        h[0, 0] = math.nan
    expected = torch.ops.aten.threshold_backward(grad, h, 0)
    (sums,) = kernels("relu_backward", grad, h)
    assert torch.equal(grad, expected)
    assert torch.equal(sums.double().sum(0), expected.double().sum(0))
