"""Which images are in a batch, and their noise and views: drawn from the seed alone, each image as often as another."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pyglow_fast.data import Augmentation, ImageSet
from pyglow_fast.train import TrainConfig, TrainState, derive
from pyglow_fast.train.seeds import batch_indices, keyed_noise, random_subset


def test_every_epoch_is_a_shuffle_of_all_images() -> None:
    epochs = [torch.cat([batch_indices(0, 5 * epoch + i, 20, 4) for i in range(5)]) for epoch in range(3)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(20))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([batch_indices(1, i, 20, 4) for i in range(5)]))
    assert len({*batch_indices(0, 0, 11, 4).tolist(), *batch_indices(0, 1, 11, 4).tolist()}) == 8  # three are dropped
    batch_indices(0, 0, 20, 4).zero_()  # what a caller does with its batch is of no consequence for the next
    assert torch.equal(epochs[0], torch.cat([batch_indices(0, i, 20, 4) for i in range(5)]))


def test_random_subset() -> None:
    subset = random_subset(3, 1000, 100)
    assert subset.tolist() == sorted(set(subset.tolist()))
    assert len(subset) == 100
    assert not torch.equal(subset, random_subset(4, 1000, 100))
    assert set(random_subset(3, 1000, 50).tolist()) < set(subset.tolist())
    assert random_subset(3, 5, 5).tolist() == random_subset(3, 5, 9).tolist() == [0, 1, 2, 3, 4]
    assert random_subset(0, 10, 3).tolist() == [0, 3, 5]  # written down, so that a change of the drawing is noticed


def test_streams_are_independent() -> None:
    assert len({derive(seed, name, n) for seed in range(3) for name in ("a", "b") for n in range(3)}) == 18
    assert derive(0, "noise") == 3016148274326734436  # written down, too


def test_noise_belongs_to_an_image_and_not_to_its_place() -> None:
    noise = keyed_noise([5, 6, 5], (2, 3), torch.device("cpu"))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    many = keyed_noise(list(range(2000)), (5,), torch.device("cpu"))
    assert ((many >= 0) & (many < 1)).all()
    # Mean of 10,000 uniform numbers: 1/2 with a deviation of 0.29 / 100; images next to each other are independent.
    assert abs(float(many.mean()) - 0.5) < 4 * 0.0029
    pairs = torch.corrcoef(torch.stack([many[:-1].flatten(), many[1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 4 / math.sqrt(9995)


def test_the_next_epoch_has_other_noise_and_other_views(
    tiny_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.randint(256, (12, 1, 5, 5), dtype=torch.uint8)
    state = TrainState(tiny_config(batch_size=9), ImageSet("twelve", pixels, 256, augmentation=Augmentation(1, True)))
    state.initialize()
    log_prob, seen = state.model.log_prob, list[torch.Tensor]()
    monkeypatch.setattr(state.model, "log_prob", lambda x, y: (seen.append(256 * (x + 0.5)), log_prob(x, y))[1])
    for _ in range(2):  # of all nine, the others are held out
        state.step()
    levels, noise = (
        torch.stack([part(x).flatten(1).sort(0).values for x in seen]) for part in (torch.floor, torch.frac)
    )
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(levels[0], levels[1])
