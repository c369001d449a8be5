"""Which images are in a batch, and their noise and views: drawn from the seed alone, each image as often as another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyglow_fast.data import Augmentation, ImageSet
from pyglow_fast.train import TrainConfig, derive
from pyglow_fast.train.feed import Feed
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import _order, batch_indices, keyed_noise, random_subset


def test_every_epoch_is_a_shuffle_of_all_images() -> None:
    epochs = [torch.cat([batch_indices(0, 5 * epoch + i, 20, 4) for i in range(5)]) for epoch in range(3)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(20))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([batch_indices(1, i, 20, 4) for i in range(5)]))


def test_an_incomplete_batch_is_dropped() -> None:
    seen = torch.cat([batch_indices(0, step, 11, 4) for step in range(2)])
    assert len(set(seen.tolist())) == 8
    assert len(batch_indices(0, 2, 11, 4)) == 4


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffle, shuffled = torch.randperm, []

    def counting(n: int, **options: Any) -> torch.Tensor:
        shuffled.append(n)
        return shuffle(n, **options)

    _order.cache_clear()
    monkeypatch.setattr(torch, "randperm", counting)
    for step in range(10):
        epoch, position = divmod(step, 5)
        order = shuffle(20, generator=torch.Generator().manual_seed(derive(0, "order", epoch)))
        batch = batch_indices(0, step, 20, 4)
        assert torch.equal(batch, order[4 * position : 4 * position + 4])
        batch.zero_()  # what a caller does with its batch is of no consequence for the next
    assert shuffled == [20, 20]


def test_random_subset() -> None:
    subset = random_subset(3, 1000, 100)
    assert subset.tolist() == sorted(set(subset.tolist()))
    assert len(subset) == 100
    assert torch.equal(subset, random_subset(3, 1000, 100))
    assert not torch.equal(subset, random_subset(4, 1000, 100))
    assert set(random_subset(3, 1000, 50).tolist()) < set(subset.tolist())
    assert random_subset(3, 5, 5).tolist() == random_subset(3, 5, 9).tolist() == [0, 1, 2, 3, 4]
    assert random_subset(0, 10, 3).tolist() == [0, 3, 5]  # written down, so that a change of the drawing is noticed


def test_streams_are_independent_and_fixed() -> None:
    assert derive(0, "noise") == derive(0, "noise")
    assert len({derive(seed, name, n) for seed in range(3) for name in ("a", "b") for n in range(3)}) == 18
    assert 0 <= derive(5, "x") < 2**63


def test_noise_belongs_to_an_image_and_not_to_its_place() -> None:
    noise = keyed_noise([5, 6, 5], (2, 3), torch.device("cpu"))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(keyed_noise([6], (2, 3), torch.device("cpu"))[0], noise[1])
    many = keyed_noise(list(range(2000)), (5,), torch.device("cpu"))
    assert ((many >= 0) & (many < 1)).all()
    # Mean of 10,000 uniform numbers: 1/2 with a deviation of 0.29 / 100; images next to each other are independent.
    assert abs(float(many.mean()) - 0.5) < 4 * 0.0029
    pairs = torch.corrcoef(torch.stack([many[:-1].flatten(), many[1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 4 / math.sqrt(9995)


def test_the_next_epoch_has_other_noise_and_other_views(tiny_config: Callable[..., TrainConfig]) -> None:
    pixels = torch.randint(256, (8, 1, 6, 6), dtype=torch.uint8)
    data = ImageSet("one batch", pixels, 256, torch.arange(8), tuple("abcdefgh"), augmentation=Augmentation(2, True))
    feed, epochs = Feed(tiny_config(), data, 0, Ranks(), torch.device("cpu")), []
    for _ in range(2):
        (part,) = next(feed)
        assert part.labels is not None
        seen = 256 * (part.x[part.labels.argsort()] + 0.5)
        epochs.append((seen.floor(), seen.frac()))
    views, noise = ((one != other).flatten(1).any(1) for one, other in zip(*epochs, strict=True))
    assert noise.all()
    assert views.sum() > 4  # of eight; one of 18 views is the same by chance
