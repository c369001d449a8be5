"""Glow: gradients of its density against those of a second writing of it, shapes, layouts, bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch
from support.glow_settings import CONDITION, Setting
from support.helpers import assert_close, memory_layouts
from support.plain_glow import plain_log_prob

import pyglow_fast as pgf
from pyglow_fast import likelihood

some_configs = pytest.mark.parametrize("name", ["default", "one dimension", "classes", "map", "everything"])


class TestDensity:
    @some_configs
    def test_gradients_are_those_of_the_plain_computation(self, name: str) -> None:
        setting = Setting(name)
        parameters = dict(setting.model.named_parameters())
        loss = setting.model.log_prob(setting.x, setting.y, setting.cond).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        state = {key: value.detach().clone() for key, value in setting.state.items()}
        leaves = [state[key].requires_grad_() for key in parameters]
        plain = plain_log_prob(state, setting.config, setting.x, setting.y, setting.cond).sum()
        for got, expected in zip(gradients, torch.autograd.grad(plain, leaves), strict=True):
            largest = max(1.0, float(expected.abs().max()))
            assert_close(got / largest, expected / largest, condition=CONDITION)

    def test_classes_matter(self) -> None:
        setting = Setting("classes")
        log_probs = [setting.model.log_prob(setting.x, torch.full((4,), label)) for label in range(3)]
        assert not torch.allclose(log_probs[0], log_probs[1])
        mixed = setting.model.log_prob(setting.x, setting.y)
        assert_close(mixed, torch.stack([log_probs[label][i] for i, label in enumerate(setting.y.tolist())]), CONDITION)

    def test_conditions_matter(self) -> None:
        setting = Setting("vector")
        log_prob = setting.model.log_prob(setting.x, cond=setting.cond)
        assert not torch.allclose(log_prob, setting.model.log_prob(setting.x, cond=setting.cond + 0.1))

    def test_a_vector_is_a_constant_map(self) -> None:
        setting = Setting("vector")
        spread = setting.cond[:, :, None, None].expand(-1, -1, 4, 4)
        log_prob = setting.model.log_prob(setting.x, cond=setting.cond)
        assert_close(setting.model.log_prob(setting.x, cond=spread), log_prob, condition=CONDITION)

    def test_gradient_reaches_the_condition(self) -> None:
        setting = Setting("map")
        cond = setting.cond.requires_grad_()
        (gradient,) = torch.autograd.grad(setting.model.log_prob(setting.x, cond=cond).sum(), cond)
        assert gradient.abs().min() > 0.0

    def test_any_memory_layout(self) -> None:
        setting = Setting("default")
        expected = setting.model.log_prob(setting.x)
        for layout in memory_layouts(setting.x).values():
            assert_close(setting.model.log_prob(layout), expected, condition=CONDITION)

    def test_no_samples(self) -> None:
        setting = Setting("everything")
        none = setting.model.log_prob(setting.x[:0], setting.y[:0], setting.cond[:0])
        assert none.shape == (0,)
        assert setting.model.sample(0, y=setting.y[:0], cond=setting.cond[:0]).shape == (0, 1, 4, 8)


class TestEncodeAndDecode:
    def test_float32(self) -> None:
        setting = Setting("default")
        model, x = setting.model.float(), setting.x.float()
        latents = model.encode(x)
        assert {z.dtype for z in latents} == {torch.float32}
        assert_close(model.decode(latents), x)

    def test_a_tuple_of_latents_will_do(self) -> None:
        setting = Setting("default")
        latents = setting.model.encode(setting.x)
        assert torch.equal(setting.model.decode(tuple(latents)), setting.model.decode(latents))

    def test_latent_shapes(self) -> None:
        model = pgf.Glow(image_shape=(3, 32, 16), n_levels=3, n_steps=1, hidden=2)
        assert model.latent_shapes == [(6, 16, 8), (12, 8, 4), (48, 4, 2)]
        assert pgf.Glow(image_shape=(2, 8), n_levels=2, n_steps=1, hidden=2).latent_shapes == [(2, 4), (4, 2)]
        assert pgf.Glow(image_shape=(1, 2, 2, 2), n_levels=1, n_steps=1, hidden=2).latent_shapes == [(8, 1, 1, 1)]


class TestBitsPerDim:
    def identity(self) -> pgf.Glow:
        """z is a permutation of x, with standard normal priors: evaluation mode leaves the actnorms at their start."""
        fields = {"coupling": "additive", "permutation": "reverse", "learn_prior": False}
        return pgf.Glow(image_shape=(1, 2, 4), n_levels=1, n_steps=2, hidden=2, **fields).double().eval()

    def test_of_the_standard_normal_by_hand(self) -> None:
        model, images = self.identity(), torch.randint(16, (3, 1, 2, 4))
        got = model.bits_per_dim(images, n_bins=16, generator=torch.Generator().manual_seed(3))
        x = likelihood.dequantize(images, 16, torch.Generator().manual_seed(3), dtype=torch.float64)
        nats = 0.5 * x.square().flatten(1).sum(1) + 0.5 * 8.0 * math.log(2.0 * math.pi)
        assert_close(got, nats / (8.0 * math.log(2.0)) + 4.0, condition=8.0)

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


def test_built_from_a_config_or_its_fields() -> None:
    config = pgf.GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=3)
    model = pgf.Glow(config)
    assert model.config is config
    assert pgf.Glow(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=3).config == config
    rebuilt = pgf.Glow(pgf.GlowConfig.from_dict(config.to_dict()))
    rebuilt.load_state_dict(model.state_dict())
