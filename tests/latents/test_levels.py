"""Kept levels and temperatures."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.glow_settings import CALM, CONDITION, Setting
from support.helpers import assert_close

from pyglow_fast import latents as tools

NAMES = ["three levels", "default", "one level", "fixed priors", "classes", "everything"]


@pytest.mark.parametrize("name", NAMES)
def test_all_levels_give_the_image_back(name: str) -> None:
    setting = Setting(name)
    levels = range(setting.config.n_levels)
    for temperature in (0.0, 1.0):
        found = tools.keep_levels(setting.model, setting.x, levels, temperature, setting.y, setting.cond)
        assert_close(found, setting.x, CONDITION)


@pytest.mark.full
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize("name", NAMES)
def test_kept_levels_stay_and_the_others_are_drawn_given_the_deeper_ones(name: str, temperature: float) -> None:
    setting = Setting(name, spread=CALM)
    model, y, cond = setting.model, setting.y, setting.cond
    n_levels = setting.config.n_levels
    original = model.encode(setting.x, cond)
    for size in range(1, n_levels + 1):
        for kept in itertools.combinations(range(n_levels), size):
            generator = torch.Generator().manual_seed(3)
            found = tools.keep_levels(model, setting.x, kept, temperature, y, cond, generator)
            encoded = model._encode(found, cond)
            generator.manual_seed(3)
            for level in reversed(range(n_levels)):
                shape = original[level].shape
                noise = temperature * torch.randn(shape, generator=generator, dtype=torch.float64)
                if level in kept:
                    assert_close(encoded.latents[level], original[level], CONDITION)
                    continue
                if level == n_levels - 1:
                    mean, log_sd = model.prior(encoded.latents[level], y)
                else:
                    mean, log_sd = model._split(level).prior(encoded.kept[level])
                assert_close(encoded.latents[level], (mean + noise * log_sd.exp()).expand(shape), CONDITION)


def test_a_dropped_top_level_is_that_of_the_class() -> None:
    setting = Setting("classes", spread=CALM)
    one, other = (torch.full((4,), label) for label in (0, 1))
    found = [setting.model.encode(tools.keep_levels(setting.model, setting.x, [0], y=y))[-1] for y in (one, other)]
    mean = [setting.model.prior(found[0], y)[0].expand_as(found[0]) for y in (one, other)]
    assert_close(found[0], mean[0], CONDITION)
    assert float((found[0] - mean[1]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["default", "classes", "everything", "fixed priors"])
def test_every_row_of_a_sweep_is_what_sample_draws(name: str) -> None:
    setting = Setting(name, n=3, spread=CALM)
    temperatures = [0.0, 0.7, 1.0]
    generator = torch.Generator().manual_seed(5)
    found = tools.temperature_sweep(setting.model, temperatures, 3, None, setting.cond, generator)
    after = torch.rand(1, generator=generator)
    for temperature, row in zip(temperatures, found, strict=True):
        generator.manual_seed(5)
        assert_close(row, setting.model.sample(3, temperature, None, setting.cond, generator), CONDITION)
    assert torch.equal(torch.rand(1, generator=generator), after)


def test_the_noise_of_a_sweep_is_scaled() -> None:
    setting = Setting("classes", n=3, spread=CALM)
    found = tools.temperature_sweep(setting.model, [1.0, 0.25], 3, setting.y)
    full, quarter = (setting.model.to_noise(row, setting.y)[0] for row in found)
    for strong, weak in zip(full, quarter, strict=True):
        assert_close(weak, strong / 4, CONDITION)


def test_a_sweep_without_a_generator_follows_the_seed_of_torch() -> None:
    setting = Setting("default", n=2, spread=CALM)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(tools.temperature_sweep(setting.model.freeze(), [0.5], 2))
    assert_close(found[0], found[1], CONDITION)
    assert float((found[0] - found[2]).abs().max()) > 1e-3
