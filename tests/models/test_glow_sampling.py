"""Glow.sample: the priors, the temperature, the generator."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.glow_settings import CALM, CONDITION, CONFIGS, Setting
from support.helpers import assert_close

import pyglow_fast as pgf

every_config = pytest.mark.parametrize("name", CONFIGS)
some_configs = pytest.mark.parametrize("name", ["default", "one dimension", "classes", "map", "everything"])


@every_config
def test_temperature_zero_is_the_mode(name: str) -> None:
    setting = Setting(name, spread=CALM)
    x = setting.model.sample(4, 0.0, setting.y, setting.cond)
    assert_close(setting.standardised(x), torch.zeros(4, setting.config.n_values).double(), condition=CONDITION)
    assert torch.equal(setting.model.sample(4, 0, setting.y, setting.cond), x)
    if setting.y is None and setting.cond is None:
        assert torch.equal(x[0], x[1])


@some_configs
def test_samples_follow_the_priors(name: str) -> None:
    n = 2000
    setting = Setting(name, n=n, spread=CALM)
    x = setting.model.sample(n, 0.7, setting.y, setting.cond)
    noise = setting.standardised(x) / 0.7
    # Six standard errors of the mean and of the mean square of n standard normals, in every dimension.
    assert float(noise.mean(0).abs().max()) < 6.0 / math.sqrt(n)
    assert float((noise.square().mean(0) - 1.0).abs().max()) < 6.0 * math.sqrt(2.0 / n)
    # Dimensions are independent: so are their products.
    correlation = noise.T @ noise / n - torch.diag(noise.square().mean(0))
    assert float(correlation.abs().max()) < 6.0 / math.sqrt(n)


def test_a_temperature_per_sample() -> None:
    setting = Setting("default", spread=CALM)
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0])
    x = setting.model.sample(4, temperature, generator=torch.Generator().manual_seed(5))
    for i, value in enumerate(temperature.tolist()):
        same = setting.model.sample(4, value, generator=torch.Generator().manual_seed(5))
        assert_close(x[i], same[i], condition=CONDITION)
    scalar = setting.model.sample(4, torch.tensor(0.5), generator=torch.Generator().manual_seed(5))
    assert_close(scalar[1], x[1], condition=CONDITION)


@some_configs
def test_a_generator_repeats(name: str) -> None:
    setting = Setting(name, spread=CALM)
    first, second, third = (
        setting.model.sample(4, 0.9, setting.y, setting.cond, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_the_noise_of_the_deepest_level_is_drawn_first() -> None:
    """So that what a seed gives is known outside of the model, as keep_levels draws it."""
    setting, generator = Setting("three levels", spread=CALM), torch.Generator().manual_seed(5)
    x = setting.model.sample(4, 0.7, generator=generator)
    generator.manual_seed(5)
    shapes = reversed(setting.model.latent_shapes)
    noise = [0.7 * torch.randn(4, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    assert_close(setting.model.from_noise(noise[::-1])[0], x, condition=CONDITION)


def test_the_global_generator_is_left_alone_or_used() -> None:
    setting = Setting("classes", spread=CALM)
    before = torch.get_rng_state()
    setting.model.sample(2, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    first = setting.model.sample(2)
    torch.set_rng_state(before)
    assert torch.equal(setting.model.sample(2), first)


def test_labels_are_drawn_if_none_are_given() -> None:
    setting = Setting("classes", spread=CALM)
    with torch.no_grad():
        setting.model.prior.class_offset[:, 0] = torch.tensor([-50.0, 0.0, 50.0])
    x = setting.model.sample(300, 0.0)
    top = setting.model.encode(x)[-1][:, 0].mean((1, 2)).round(decimals=-1)
    drawn = [int((top == value).sum()) for value in (-50.0, 0.0, 50.0)]
    assert sum(drawn) == 300
    assert min(drawn) > 50  # 100 +- 8 each


def test_a_sample_is_finite_and_keeps_its_dtype_and_no_graph() -> None:
    model = pgf.Glow(image_shape=(3, 4, 4), n_levels=2, n_steps=1, hidden=4)
    x = model.sample(5)
    assert x.shape == (5, 3, 4, 4)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert not x.requires_grad
    assert model.double().sample(1).dtype == torch.float64


def test_sampling_initialises_nothing() -> None:
    model = pgf.Glow(image_shape=(1, 4, 4), n_levels=2, n_steps=1, hidden=4, net_actnorm=True)
    before = copy.deepcopy(model.state_dict())
    model.train().sample(3)
    assert not model.is_initialized
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
