"""The checks that decide what counts as equal reject what they are there to reject."""

from __future__ import annotations

import pytest
import torch
from support import helpers
from torch import Tensor

import pyglow_fast as pgf


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
