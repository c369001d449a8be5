"""Glow: bits per dimension, labels, and where its actnorms and its prior start. Its density is tests/contract's."""

from __future__ import annotations

import copy

import pytest
import torch
from support.glow_settings import Setting
from support.helpers import assert_equal

import pyglow_fast as pgf
from pyglow_fast import likelihood
from pyglow_fast.models.prior import TopPrior


def test_bits_are_the_log_prob_of_the_dequantised_images() -> None:
    setting = Setting("everything")
    images = torch.randint(32, (4, 1, 4, 8), dtype=torch.uint8)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    got = setting.model.bits_per_dim(images, 32, setting.y, setting.cond, generators[0])
    x = likelihood.dequantize(images, 32, generators[1], dtype=torch.float64)
    log_prob = setting.model.log_prob(x, setting.y, setting.cond)
    assert torch.equal(got, likelihood.bits_per_dim(log_prob, 32, 32))


def test_one_label_for_all_samples() -> None:
    model = pgf.Glow(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4, n_classes=5)
    found, wanted = (model.sample(3, y=y, generator=torch.Generator().manual_seed(1)) for y in (3, torch.full((3,), 3)))
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match=r"^y: expected labels in 0\.\.4, found 5\.\.5"):
        model.sample(3, y=5)


def test_slips_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'n_steps'"):
        pgf.Glow(image_shape=(1, 4, 4), n_step=1)
    model = pgf.Glow(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4, n_classes=5)
    with pytest.raises(ValueError, match=r"n_bins: expected an int \(labels are y=\), found Tensor"):
        model.bits_per_dim(torch.zeros(2, 1, 4, 4, dtype=torch.int64), torch.tensor([0, 1]), y=torch.tensor([0, 1]))


def test_the_first_batch_makes_every_state_standard() -> None:
    """In a training forward and in ``initialize`` alike."""
    model = pgf.Glow(image_shape=(1, 4, 4), n_levels=2, n_steps=2, hidden=4, net_actnorm=True).double()
    x = torch.randn(200, 1, 4, 4, dtype=torch.float64) * 0.1 + 0.3
    twin = copy.deepcopy(model)
    assert not model.is_initialized
    model.log_prob(x)
    twin.initialize(x)
    assert model.is_initialized
    assert twin.is_initialized
    assert_equal(model.state_dict(), twin.state_dict())
    # With fresh couplings the top latent is what the last actnorm made, rotated and half of it scaled.
    for z in model.encode(x):
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
