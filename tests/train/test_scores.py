"""Bits/dim image by image and on average: batches, refusals, and the CSV file."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.train import ImageScores, Score, ScoredImages, evaluate, score_csv, score_images
from pyglow_fast.train.evaluation import gap_words
from pyglow_fast.train.seeds import derive, keyed_noise


@pytest.fixture
def images() -> ImageSet:
    pixels = torch.randint(5, (10, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    groups = tuple(f"{i // 2}.png" for i in range(10))
    return ImageSet("tiny", pixels, 5, torch.arange(10) % 2, ("even", "odd, not even"), groups)


@pytest.fixture
def model(images: ImageSet) -> Glow:
    glow = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=2, hidden=4))
    glow.initialize(images.pixels / 5.0 - 0.4)
    return glow


def test_the_score_is_the_mean_over_images_whatever_the_batches(model: Glow, images: ImageSet) -> None:
    noise = keyed_noise(torch.tensor([derive(7, "noise", i) for i in range(10)]), (1, 4, 4))
    with torch.no_grad():
        bits = bits_per_dim(model.eval().log_prob(dequantize(images.pixels, 5, noise=noise)), 16, 5).double()
    model.train()
    told: list[int] = []
    score = evaluate(model, images, 4, seed=7, progress=told.append)
    assert told == [4, 4, 2]
    assert model.training
    assert (score.images, score.mean) == (10, pytest.approx(float(bits.mean()), rel=1e-6))
    assert score.standard_error == pytest.approx(float(bits.std() / math.sqrt(10)), rel=1e-5)
    some = score_images(model, images, 3, 7, limit=5)
    assert torch.allclose(some.bits_per_dim, bits[some.indices], rtol=1e-6)
    assert evaluate(model, images, 3, 7, limit=5).mean == pytest.approx(float(bits[some.indices].mean()), rel=1e-6)


def scores_of(*values: float) -> ImageScores:
    return ImageScores(torch.arange(len(values)), torch.tensor(values, dtype=torch.float64))


def test_csv(images: ImageSet) -> None:
    found = ScoredImages(images.subset([1, 4, 6]), scores_of(1.5, math.nan, math.inf), torch.tensor([1, 4, 6]))
    assert score_csv({"held-out": found}).splitlines() == [
        "index,name,label,bits_per_dim",
        '1,0.png,"odd, not even",1.5',
        "4,2.png,even,nan",
        "6,3.png,even,inf",
    ]
    assert found.complaints() == ["2 images without a finite likelihood, left out of the figures: 4 (2.png), 6 (3.png)"]


def test_names_act_in_no_terminal() -> None:
    names = ("=1+1", "a\n\x1b[31m\udcff.png", *"abcde")
    images = ImageSet("odd", torch.zeros(7, 1, 4, 4, dtype=torch.uint8), 5, groups=names)
    (line,) = ScoredImages(images, scores_of(1.0, *[math.nan] * 6)).complaints()
    assert line.endswith(r"figures: 1 (a\n\x1b[31m\udcff.png), 2 (a), 3 (b), 4 (c), 5 (d) and 1 more")
    lost = ScoredImages(images, ImageScores(torch.arange(6), torch.ones(6), (6,)))
    assert lost.complaints() == ["1 image that cannot be read: 6 (e)"]


@pytest.mark.parametrize(
    ("held_out", "error", "train", "best", "words"),
    [
        (2.2, 0.02, 0.8, (1.5, 400), "overfitting: held-out was best at step 400, 1.500 bits/dim, and is 2.200 now"),
        (1.55, 0.02, 1.2, (1.5, 400), "held-out images cost 0.350 bits/dim more than training images"),
        (1.5, 0.02, 1.2, (1.5, 900), "held-out images cost 0.300 bits/dim more than training images"),
        (1.5, 0.02, 1.2, None, "held-out images cost 0.300 bits/dim more than training images"),
        (1.5, 0.02, 1.45, (1.5, 900), "held-out images cost about what training images do: no overfitting"),
        (1.5, 0.2, 1.0, (1.5, 900), "held-out images cost about what training images do: no overfitting"),
    ],
)
def test_what_the_gap_means(
    held_out: float, error: float, train: float, best: tuple[float, int] | None, words: str
) -> None:
    """One within the error is none."""
    found = gap_words(Score(held_out, error, 100), Score(train, math.nan, 1), 900, *(best or (None, 0)))
    assert found.startswith(words)
    assert ("--max-steps 400," in found) == found.startswith("overfitting")


def test_without_labels_of_its_classes_a_model_is_the_mean_over_them(images: ImageSet) -> None:
    """p(x) = mean of p(x | y): of images without labels, of foreign classes, and of its own where that is asked for."""
    model = Glow(GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=2, hidden=4, n_classes=2)).eval()
    model.initialize(images.pixels / 5.0 - 0.4)
    with torch.no_grad():
        model.prior.class_offset.normal_()
        given = [replace(images, labels=torch.full((10,), y)) for y in (0, 1)]
        each = [score_images(model, data, 4, seed=7).bits_per_dim for data in given]
    nats = -math.log(2) * model.config.n_values * torch.stack(each, 1)
    wanted = -(nats.logsumexp(1) - math.log(2)) / (math.log(2) * model.config.n_values)
    foreign = replace(images, labels=torch.zeros(10, dtype=torch.int64), class_names=("a", "b", "c"))
    for data, options in (
        (replace(images, labels=None, class_names=()), {}),
        (foreign, {}),
        (images, {"over_classes": True}),
    ):
        assert torch.allclose(score_images(model, data, 4, seed=7, **options).bits_per_dim, wanted, rtol=1e-5)
