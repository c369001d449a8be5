"""Bits/dim over images: the mean that it says, over all classes, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.train import Score, derive, evaluate
from pyglow_fast.train.seeds import keyed_noise


def test_evaluate_is_the_mean_over_images_whatever_the_batches(tiny_images: ImageSet) -> None:
    model = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4))
    noise = keyed_noise([derive(9, "noise", i) for i in range(40)], (1, 4, 4), torch.device("cpu"))
    with torch.no_grad():
        model.initialize(torch.rand(8, 1, 4, 4) - 0.5)
        x = dequantize(tiny_images.pixels, 5, noise=noise)
        bits = bits_per_dim(model.eval().log_prob(x), 16, 5).double()
    model.train()
    score = evaluate(model, tiny_images, 64, seed=9)
    assert model.training
    assert score.images == 40
    assert score.mean == pytest.approx(float(bits.mean()), rel=1e-6)
    assert score.standard_error == pytest.approx(float(bits.std() / math.sqrt(40)), rel=1e-5)
    limited = evaluate(model, tiny_images, 7, seed=9, limit=10)
    assert limited.images == 10
    assert evaluate(model, tiny_images, 7, seed=9, limit=10) == limited
    assert math.isnan(evaluate(model, tiny_images, 7, seed=9, limit=1).standard_error)


def test_evaluate_on_some_images_sees_all_classes(sorted_images: ImageSet) -> None:
    """Scored by a model that knows the black images only, some of the images must be worth what all of them are."""
    model = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4))
    model.initialize(torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)) / 5 - 0.5)
    whole = evaluate(model, sorted_images, 64, seed=0)
    black = evaluate(model, sorted_images.subset(range(50)), 64, seed=0)
    assert whole.mean > black.mean + 5
    for seed in range(3):
        some = evaluate(model, sorted_images, 64, seed, limit=50)
        assert abs(some.mean - whole.mean) < 3 * some.standard_error


def test_one_image_has_no_standard_error() -> None:
    assert Score(1.0, math.nan, 1).error_text == "n/a"
    assert Score(1.0, 0.25, 2).error_text == "0.250"


def test_evaluate_refuses_what_does_not_fit(tiny_images: ImageSet) -> None:
    with pytest.raises(ValueError, match=r"data: expected images of shape \(3, 4, 4\)"):
        evaluate(Glow(GlowConfig(image_shape=(3, 4, 4), n_levels=1, n_steps=1, hidden=4)), tiny_images, 8, 0)
    unlabelled = ImageSet("x", tiny_images.pixels, 5)
    conditional = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4, n_classes=2))
    with pytest.raises(ValueError, match="data: expected 2 classes, as the model was trained on, found 0"):
        evaluate(conditional, unlabelled, 8, 0)
