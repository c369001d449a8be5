"""The prior of the top latent and the noise for sampling."""

from __future__ import annotations

import pytest
import torch
from support.helpers import assert_close

from pyglow_fast.models.prior import TopPrior, scaled_noise


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("n_classes", [None, 3])
def test_starts_as_the_standard_normal(learn: bool, n_classes: int | None) -> None:
    prior, like = TopPrior(4, n_classes, learn), torch.randn(2, 4, 3, 5)
    y = None if n_classes is None else torch.tensor([2, 0])
    for value in prior(like, y):
        assert torch.broadcast_shapes(value.shape, like.shape) == like.shape
        assert not value.any()
    assert len(list(prior.parameters())) == learn + (n_classes is not None)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 3), (2, 4, 3, 5), (2, 4, 1, 2, 3)], ids=str)
def test_one_mean_and_spread_per_channel_and_class(shape: tuple[int, ...]) -> None:
    prior = TopPrior(4, 3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    mean, log_sd = prior(torch.zeros(shape), torch.tensor([2, 0]))
    for i, label in enumerate((2, 0)):
        expected = prior.mean_log_sd + prior.class_offset[label]
        assert_close(mean[i].flatten(), expected[:4])
        assert_close(log_sd[i].flatten(), expected[4:])


def test_noise_follows_its_generator_and_temperature() -> None:
    like = torch.empty(3, 2, 4, dtype=torch.float64)
    expected = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for temperature in (1.0, 0.5, 2, torch.tensor(0.5), torch.tensor([0.0, 1.0, 2.0])):
        noise = scaled_noise(like, temperature, torch.Generator().manual_seed(4))
        factor = torch.as_tensor(temperature).reshape(-1, 1, 1)
        assert noise.dtype == torch.float64
        assert torch.equal(noise, expected * factor)
