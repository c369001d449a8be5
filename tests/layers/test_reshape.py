"""Squeeze and Split, and conditions brought to the size of a level."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import assert_close
from torch import Tensor
from torch.distributions import Normal

import pyglow_fast as pgf
from pyglow_fast.models.condition import fitted


class TestSqueeze:
    @pytest.mark.parametrize("factor", [1, 2, 3])
    def test_order(self, factor: int) -> None:
        x = torch.randn(2, 3, 2 * factor, 3 * factor)
        z, log_det = pgf.Squeeze(factor)(x)
        assert torch.equal(z, F.pixel_unshuffle(x, factor))
        assert torch.equal(log_det, torch.zeros(2))


class TestSplit:
    @staticmethod
    def trained(channels: int, dims: int) -> pgf.Split:
        split = pgf.Split(channels, dims=dims).double()
        with torch.no_grad():
            for parameter in split.parameters():
                parameter.normal_(0.0, 0.1)
        return split

    @pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 1, 3)], ids=str)
    def test_what_is_kept_stays_and_what_leaves_is_standardised(self, spatial: tuple[int, ...]) -> None:
        x, split = torch.randn(2, 6, *spatial, dtype=torch.float64), self.trained(6, len(spatial))
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

    @pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 1, 3)], ids=str)
    def test_learned_prior(self, spatial: tuple[int, ...]) -> None:
        split = self.trained(4, len(spatial))
        kept, factored = torch.randn(2, 3, 2, *spatial, dtype=torch.float64)
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(spatial)]
        out = conv(kept, split.conv.weight, split.conv.bias, padding=1) * (3.0 * split.log_gain).exp()
        mean, log_sd = out[:, :2], out[:, 2:]
        expected = Normal(mean, log_sd.exp()).log_prob(factored).flatten(1).sum(1)
        largest = float((factored - mean).div(log_sd.exp()).square().max().detach())
        assert_close(split.log_prob(kept, factored), expected, condition=largest * kept[0].numel())


class TestFitCondition:
    @pytest.mark.parametrize("spatial", [(4,), (2, 3), (1, 2, 3)], ids=str)
    def test_a_vector_is_spread(self, spatial: tuple[int, ...]) -> None:
        cond = torch.randn(3, 2)
        found = fitted(cond, spatial)
        assert found.shape == (3, 2, *spatial)
        assert torch.equal(found.flatten(2), cond[:, :, None].expand(3, 2, math.prod(spatial)))

    def test_a_map_of_the_right_size_is_left_alone(self) -> None:
        cond = torch.randn(3, 2, 4, 6)
        assert fitted(cond, (4, 6)) is cond

    @pytest.mark.parametrize(("size", "spatial"), [((8,), (4,)), ((4, 6), (2, 3)), ((2, 4, 4), (1, 2, 2))], ids=str)
    def test_a_larger_map_is_averaged(self, size: tuple[int, ...], spatial: tuple[int, ...]) -> None:
        cond = torch.randn(3, 2, *size)
        blocks: Tensor = pgf.reference.squeeze(cond).reshape(3, 2, 2 ** len(size), *spatial)
        assert_close(fitted(cond, spatial), blocks.mean(2))
