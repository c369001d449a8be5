"""The checks that decide what is equal, and the meter of memory, tell what is wrong."""

from __future__ import annotations

import pytest
import torch
from support import helpers
from torch import Tensor

import pyglow_fast as pgf
from bench.memory_meter import peak_tensor_bytes


def test_close_is_close() -> None:
    x = torch.randn(4, 10, dtype=torch.float64)
    helpers.assert_close(x + 1e-14, x)
    for wrong in (x + 1e-10, x.float() + 1e-3, torch.full_like(x, float("nan")), x[:1]):
        with pytest.raises(AssertionError):
            helpers.assert_close(wrong, x)


def test_kernel_close_measures_against_plain_torch() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    plain = exact.float() + 1e-5 * torch.randn(1000)
    helpers.assert_kernel_close(plain, plain, exact)
    three_times = (exact + 3.0 * (plain.double() - exact)).float()
    for wrong in (three_times, torch.zeros(1000), plain * float("nan"), plain[:5], exact):
        with pytest.raises(AssertionError):
            helpers.assert_kernel_close(wrong, plain, exact)


def test_a_log_det_of_one_position_is_no_bijections(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    layer = pgf.ActNorm(3).double()
    layer(2.0 * x)
    helpers.assert_bijection(layer, x)

    def forget_positions(x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = pgf.ActNorm.forward(layer, x, cond)
        return z, log_det / x[0, 0].numel()

    monkeypatch.setattr(layer, "forward", forget_positions)
    with pytest.raises(AssertionError):
        helpers.assert_bijection(layer, x)


def test_the_meter_counts_what_is_alive() -> None:
    """Each tensor of 1000 bytes once, with what autograd holds of it, until it is freed."""
    x = torch.ones(250, requires_grad=True)

    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(250).view(10, 25).add_(1.0)

    def all_together(n: int) -> None:
        y = x
        for _ in range(n):
            y = y.sin()  # keeps its input
        torch.autograd.grad(y.sum(), x)

    peaks = [
        peak_tensor_bytes(call) for call in (one_after_the_other, lambda: all_together(18), lambda: all_together(8))
    ]
    assert peaks[0] == 1000
    assert peaks[1] - peaks[2] == 10 * 1000
