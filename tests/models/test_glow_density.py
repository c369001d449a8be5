"""A density integrates to 1: summed over a grid of all the x there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf

RADIUS = 10.0  # the models below put less than 1e-9 of their mass outside
STEPS = 400


def small_glow(**fields: object) -> pgf.Glow:
    """A Glow of two values, bent away from a normal, its mass within a few units of 0."""
    model = pgf.Glow(image_shape=(1, 2), n_levels=1, n_steps=3, hidden=6, **fields).double()
    cond = torch.randn(256, 1, dtype=torch.float64) if model.config.cond_channels else None
    model.initialize(1.3 * torch.randn(256, 1, 2, dtype=torch.float64), cond=cond)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval()


def integrals(log_prob: Callable[[Tensor], Tensor]) -> list[float]:
    """By the trapezoid rule over [-RADIUS, RADIUS]^2, with steps h, 2 h and 4 h; the density is 0 at the border."""
    axis = torch.linspace(-RADIUS, RADIUS, STEPS + 1, dtype=torch.float64)
    with torch.no_grad():
        density = log_prob(torch.cartesian_prod(axis, axis).unsqueeze(1)).exp().reshape(STEPS + 1, STEPS + 1)
    spacing = 2.0 * RADIUS / STEPS
    return [float(density[::every, ::every].sum()) * (every * spacing) ** 2 for every in (1, 2, 4)]


@pytest.mark.full
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"coupling": "additive"},
        {"permutation": "invconv_plain", "scale_map": "tanh", "scale_clamp": 0.5},
        {"permutation": "shuffle", "scale_map": "exp"},
        {"permutation": "reverse", "scale_map": "atan", "scale_clamp": 0.5, "net_actnorm": True},
        {"scale_eps": 0.2, "learn_prior": False},
        {"n_classes": 2},
        {"cond_channels": 1},
    ],
    ids=str,
)
def test_integrates_to_one(fields: dict[str, object]) -> None:
    model = small_glow(**fields)

    def log_prob(grid: Tensor) -> Tensor:
        y = None if model.config.n_classes is None else torch.ones(len(grid), dtype=torch.int64)
        cond = torch.full((len(grid), 1), 0.7, dtype=torch.float64) if model.config.cond_channels else None
        return model.log_prob(grid, y, cond)

    fine, coarse, coarser = integrals(log_prob)
    # The nets are piecewise linear, so the density has edges and the rule an error that falls as h^2 at best: what a
    # coarser grid changes bounds what a finer one still would.
    error = abs(fine - coarse) + abs(coarse - coarser) + 1e-8
    assert error < 1e-3, "too coarse a grid to tell"
    assert abs(fine - 1.0) <= error


def test_without_its_log_det_it_does_not() -> None:
    model = small_glow()
    fine, coarse, _ = integrals(lambda grid: model.log_prob(grid) - model(grid)[1])
    assert fine == pytest.approx(coarse, abs=1e-3)
    assert abs(fine - 1.0) > 0.05
