"""When a Glow sets its actnorms from data, and when it must not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import pyglow_fast as pgf
from pyglow_fast.models.prior import TopPrior

FIELDS: dict[str, Any] = {"image_shape": (1, 4, 4), "n_levels": 2, "n_steps": 2, "hidden": 4, "net_actnorm": True}


def test_the_first_training_forward_initialises() -> None:
    model, x = pgf.Glow(**FIELDS), torch.rand(8, 1, 4, 4) - 0.5
    twin = copy.deepcopy(model)
    assert not model.is_initialized
    model.log_prob(x)
    twin.initialize(x)
    assert model.is_initialized
    assert twin.is_initialized
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_it_makes_every_state_standard() -> None:
    # With fresh couplings the top latent is what the last actnorm made, rotated and half of it scaled.
    model = pgf.Glow(**FIELDS).double()
    x = torch.randn(200, 1, 4, 4, dtype=torch.float64) * 0.1 + 0.3
    model.log_prob(x)
    latents = model.encode(x)
    for z in latents:
        assert float(z.detach().mean().abs()) < 1e-10
        assert 0.7 < float(z.detach().std()) < 1.01  # sigmoid(2)^2 = 0.78 on the half that couplings scale


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("n_classes", [None, 3])
def test_the_top_prior_starts_as_the_standard_normal(learn: bool, n_classes: int | None) -> None:
    prior, like = TopPrior(4, n_classes, learn), torch.randn(2, 4, 3, 5)
    y = None if n_classes is None else torch.tensor([2, 0])
    for value in prior(like, y):
        assert torch.broadcast_shapes(value.shape, like.shape) == like.shape
        assert not value.any()
    assert len(list(prior.parameters())) == learn + (n_classes is not None)
