"""Glow: bits per dimension. Its density is the business of tests/contract."""

from __future__ import annotations

import math

import pytest
import torch
from support.glow_settings import Setting

import pyglow_fast as pgf
from pyglow_fast import likelihood


class TestBitsPerDim:
    def test_is_the_log_prob_of_the_dequantised_images(self) -> None:
        setting = Setting("everything")
        images = torch.randint(32, (4, 1, 4, 8), dtype=torch.uint8)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        got = setting.model.bits_per_dim(images, 32, setting.y, setting.cond, generators[0])
        x = likelihood.dequantize(images, 32, generators[1], dtype=torch.float64)
        log_prob = setting.model.log_prob(x, setting.y, setting.cond)
        assert torch.equal(got, likelihood.bits_per_dim(log_prob, 32, 32))

    def test_bounds_the_bits_of_a_discrete_model(self) -> None:
        # Summed over all images, 2^-bits is at most 1: a code for every image. Two pixels of four levels: 16 images.
        model = pgf.Glow(image_shape=(1, 2), n_levels=1, n_steps=2, hidden=4).double()
        model.initialize(torch.rand(64, 1, 2, dtype=torch.float64) - 0.5)
        images = torch.cartesian_prod(torch.arange(4), torch.arange(4)).reshape(16, 1, 2)
        bits = torch.stack([model.bits_per_dim(images, 4) for _ in range(200)]).mean(0) * 2.0
        assert (-bits * math.log(2.0)).exp().sum().item() < 1.0


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
