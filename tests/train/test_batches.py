"""Which images are in a batch, and their noise and views: drawn from the seed alone, each image as often as another."""

from __future__ import annotations

import math

import torch

from pyglow_fast.train.seeds import batch_indices, derive, keyed_noise


def test_every_epoch_is_a_shuffle_of_all_images() -> None:
    epochs = [torch.cat([batch_indices(0, 5 * epoch + i, 20, 4) for i in range(5)]) for epoch in range(3)]
    for order in epochs:
        assert order.sort().values.tolist() == list(range(20))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.cat([batch_indices(1, i, 20, 4) for i in range(5)]))
    assert len({*batch_indices(0, 0, 11, 4).tolist(), *batch_indices(0, 1, 11, 4).tolist()}) == 8  # three are dropped


def test_streams_are_independent() -> None:
    assert len({derive(seed, name, n) for seed in range(3) for name in ("a", "b") for n in range(3)}) == 18
    assert derive(0, "noise") == 3016148274326734436  # written down, too


def test_noise_belongs_to_an_image_and_not_to_its_place() -> None:
    noise = keyed_noise(torch.tensor([5, 6, 5]), (2, 3))
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    many = keyed_noise(torch.tensor([derive(0, i) for i in range(2000)]), (5,))
    assert ((many >= 0) & (many < 1)).all()
    # Mean of 10,000 uniform numbers: 1/2 with a deviation of 0.29 / 100; images next to each other are independent.
    assert abs(float(many.mean()) - 0.5) < 4 * 0.0029
    pairs = torch.corrcoef(torch.stack([many[:-1].flatten(), many[1:].flatten()]))
    assert abs(float(pairs[0, 1])) < 4 / math.sqrt(9995)
