"""The halves of checkerboards: against indices, of any layout and dtype, and their derivatives."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.helpers import memory_layouts
from torch import Tensor

from pyglow_fast import _backend, functional, ops, reference

compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
SHAPES = [(2, 3, 4, 6), (1, 2, 2, 5), (3, 1, 6, 1), (2, 2, 8), (2, 2, 4, 3, 5), (1, 1, 2, 1, 4)]
SHAPES += [(2, 1, 4, 37), (1, 2, 2, 3, 18)]  # rows of several vectors, and what is left of one
SHAPES += [(0, 2, 4, 3), (2, 3, 0, 3), (2, 3, 4, 0)]  # nothing at all
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def by_index(x: Tensor, parity: int) -> Tensor:
    """The first half, position by position."""
    n, channels, rows, *rest = x.shape
    half = x.new_empty(n, channels, rows // 2, *rest)
    for index in product(*(range(size) for size in half.shape[2:])):
        row = 2 * index[0]
        row += (row + sum(index[1:])) % 2 != parity
        half[:, :, *index] = x[:, :, row, *index[1:]]
    return half


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parity", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_halves(shape: tuple[int, ...], parity: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every value goes to its place, and back, to the bit: also those that are not finite."""
    x = torch.randn(shape).to(device, dtype)
    if x.numel() > 4:
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    first, second = by_index(x, parity), by_index(x, 1 - parity)
    for split, merge in (
        (functional.checkerboard_split, functional.checkerboard_merge),
        (reference.checkerboard_split, reference.checkerboard_merge),
    ):
        halves = split(x, parity)
        assert _same_bits(halves, torch.cat([first, second], dim=1))
        assert _same_bits(split(x, parity, both=False), first)
        assert _same_bits(merge(halves, parity), x)
        masked = merge(first, parity, both=False)
        assert _same_bits(split(masked, parity), torch.cat([first, torch.zeros_like(second)], dim=1))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    integer = integers[one.element_size()]
    return one.shape == other.shape and torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (2, 4, 8), (2, 4, 4, 3, 5)], ids=str)
def test_layouts(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device)
    halves = functional.checkerboard_split(x, 1)
    for name, laid_out in memory_layouts(x).items():
        assert torch.equal(functional.checkerboard_split(laid_out, 1), halves), name
    for name, laid_out in memory_layouts(halves).items():
        assert torch.equal(functional.checkerboard_merge(laid_out, 1), x), name


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("shape", [(2, 2, 4, 3), (1, 2, 6), (2, 2, 2, 3, 2)], ids=str)
def test_derivatives_of_first_and_second_order(shape: tuple[int, ...], both: bool, device: torch.device) -> None:
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    for function in (functional.checkerboard_split, functional.checkerboard_merge):

        def move(x: Tensor, function: object = function) -> Tensor:
            return function(x, 1, both)  # type: ignore[operator]

        assert torch.autograd.gradcheck(move, x)
        assert torch.autograd.gradgradcheck(move, x)
        expected = getattr(reference, function.__name__)
        _, tangent = torch.func.jvp(move, (x.detach(),), (x.detach().sin(),))
        assert torch.equal(tangent, expected(x.detach().sin(), 1, both))
        assert torch.equal(torch.func.vmap(move)(x.detach()[None]), expected(x.detach(), 1, both)[None])


def test_an_odd_first_side_is_refused(device: torch.device) -> None:
    for x in (torch.zeros(2, 3, 5, 4, device=device), torch.zeros(2, 3, device=device)):
        with pytest.raises(ValueError, match=r"^x: expected an even first spatial side.*, found shape"):
            reference.checkerboard_split(x, 0)
    with pytest.raises(ValueError, match=r"x: expected an even first (spatial )?side"):
        functional.checkerboard_split(torch.zeros(2, 3, 5, 4, device=device), 0)


@compiled
def test_bad_input() -> None:
    x = torch.zeros(2, 3, 4, 4)
    for call, message in (
        (lambda: ops.checkerboard_split(x, 2, True), "parity: expected 0 or 1, found 2"),
        (lambda: ops.checkerboard_merge(x, 0, True), "halves: expected an even number of channels"),
        (lambda: ops.checkerboard_split(x[0, 0], 0, True), "x: expected 1 to 3 spatial dimensions"),
        (lambda: ops.checkerboard_split(x.int(), 0, True), "x: expected dtype float32 or float64"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


@compiled
def test_opcheck() -> None:
    for shape, both in product([(2, 2, 4, 3), (1, 2, 6), (2, 2, 2, 3, 2)], [True, False]):
        for layout in memory_layouts(torch.randn(shape)).values():
            torch.library.opcheck(ops.checkerboard_split, (layout, 1, both))
            torch.library.opcheck(ops.checkerboard_merge, (layout, 0, both))


@compiled
def test_the_kernels_run() -> None:
    """On the CPU, and not torch's selections."""
    x = torch.randn(2, 2, 4, 4, requires_grad=True)
    assert type(functional.checkerboard_split(x, 0).grad_fn).__name__ == "CheckerboardSplitBackward"
    assert type(functional.checkerboard_merge(x, 0).grad_fn).__name__ == "CheckerboardMergeBackward"
