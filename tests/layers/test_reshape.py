"""Haar and Split. What holds of all bijections, and of conditions at each level, is in tests/contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.gradients import perturbed
from support.helpers import assert_close
from torch.distributions import Normal

import pyglow_fast as pgf


class TestHaar:
    """Against the two forms in which it is met: IRN's convolution, and HiNet's sums of four."""

    def test_is_irn(self) -> None:
        x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
        weight = torch.ones(4, 1, 2, 2, dtype=torch.float64)
        weight[1, 0, :, 1], weight[2, 0, 1, :] = -1, -1
        weight[3, 0, 0, 1] = weight[3, 0, 1, 0] = -1
        bands = F.conv2d(x, weight.repeat(3, 1, 1, 1), stride=2, groups=3) / 4
        z, log_det = pgf.Haar(0.25)(x)
        assert_close(z, bands.reshape(2, 3, 4, 2, 3).transpose(1, 2).flatten(1, 2))
        assert_close(log_det, torch.full((2,), -3 * 2 * 3 * math.log(16.0), dtype=torch.float64))

    def test_is_hinet(self) -> None:
        x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
        a, b, c, d = (x[..., i::2, j::2] / 2 for i in (0, 1) for j in (0, 1))
        z, log_det = pgf.Haar(sign=-1)(x)
        assert_close(z, torch.cat([a + b + c + d, b + d - a - c, c + d - a - b, a - b - c + d], 1))
        assert not log_det.any()


class TestSplit:
    @pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 1, 3)], ids=str)
    def test_what_is_kept_stays_and_what_leaves_is_standardised(self, spatial: tuple[int, ...]) -> None:
        x, split = torch.randn(2, 6, *spatial, dtype=torch.float64), perturbed(pgf.Split(6, dims=len(spatial)).double())
        z, log_det = split(x)
        kept, factored = split.parts(x)
        mean, log_sd = split.prior(kept)
        assert torch.equal(z[:, :3], x[:, :3])
        assert_close(z[:, 3:] * log_sd.exp() + mean, factored, condition=10.0)
        # Standard normal noise and the change of variables: the density of the prior.
        expected = Normal(0.0, 1.0).log_prob(z[:, 3:]).flatten(1).sum(1) + log_det
        assert_close(split.log_prob(kept, factored), expected, condition=100.0)

    @pytest.mark.parametrize("learn_prior", [True, False])
    def test_fresh_prior_is_the_standard_normal(self, learn_prior: bool) -> None:
        split, kept, factored = pgf.Split(4, learn_prior), torch.randn(3, 2, 2, 3), torch.randn(3, 2, 2, 3)
        for value in split.prior(kept):
            assert value.shape == kept.shape
            assert not value.any()
        expected = Normal(0.0, 1.0).log_prob(factored).sum((1, 2, 3))
        assert_close(split.log_prob(kept, factored), expected, condition=12.0)
        assert bool(list(split.parameters())) == learn_prior
