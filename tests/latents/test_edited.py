"""Edited latents against the formulas, written out with the model's parts, and the one loop that decodes them.

Results are compared within a tolerance: products of matrices by MKL depend in their last bits on where torch has placed
the memory of a batch, so two ways to the same images may differ there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from support.glow_settings import CALM, CONDITION, Setting
from support.helpers import assert_close, assert_kernel_close
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import latents as tools
from pyglow_fast.models.condition import fitted
from pyglow_fast.models.prior import scaled_noise

NAMES = [
    "one level",
    "default",
    "three levels",
    "fixed priors",
    "classes",
    "classes, fixed priors",
    "vector",
    "map",
    "everything",
    "one dimension",
    "checkerboard",
    "last checkerboard",
    "realnvp",
]


def shifts(setting: Setting) -> list[Tensor]:
    return [0.05 * torch.randn(shape, dtype=torch.float64) for shape in setting.model.latent_shapes]


def shares_of(n_levels: int) -> list[list[float]]:
    """None kept, all kept, some of each, and each level alone untouched."""
    alone = [[1.0 if i == level else 0.3 for i in range(n_levels)] for level in range(n_levels)]
    return [[0.0] * n_levels, [0.5] * n_levels, *alone, [1.0] * n_levels]


def by_hand(setting: Setting, latents: Sequence[Tensor], shift: Sequence[Tensor], keep: Sequence[float]) -> Tensor:
    """z'_l = mean_l + keep_l (z_l - mean_l) + shift_l, from the deepest level up."""
    model, n = setting.model, len(latents[0])
    conds = model._check_cond(setting.cond, n)
    state = torch.empty(0)
    for i in reversed(range(setting.config.n_levels)):
        if i == setting.config.n_levels - 1:
            mean = model.prior(latents[i], setting.y)[0]
        else:
            mean = model._split(i).prior(state, fitted(conds[i], state.shape[2:]))[0]
        z = keep[i] * latents[i] + (1.0 - keep[i]) * mean + shift[i]
        state = z if i == setting.config.n_levels - 1 else torch.cat([state, z], dim=1)
        state = model.levels[i].inverse(state, conds[i])[0]
    return state


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_the_latents_follow_the_formula(name: str) -> None:
    setting = Setting(name, spread=CALM)
    latents, shift = setting.model.encode(setting.x, setting.cond), shifts(setting)
    for keep in shares_of(setting.config.n_levels):
        found = tools.edited(setting.model, latents, shift, keep, "latent", setting.y, setting.cond)
        assert_close(found, by_hand(setting, latents, shift, keep), CONDITION)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_the_noise_follows_the_formula(name: str) -> None:
    setting = Setting(name, spread=CALM)
    model, y, cond = setting.model, setting.y, setting.cond
    noise, shift = model.to_noise(setting.x, y, cond)[0], shifts(setting)
    for keep in shares_of(setting.config.n_levels):
        expected = [share * eps + step for share, eps, step in zip(keep, noise, shift, strict=True)]
        found = tools.edited(model, noise, shift, keep, "noise", y, cond)
        assert_close(found, model.from_noise(expected, y, cond)[0], CONDITION)


@pytest.mark.parametrize("space", tools.SPACES)
@pytest.mark.parametrize("name", NAMES)
def test_without_an_edit_it_is_from_space(name: str, space: str) -> None:
    setting = Setting(name)
    model, y, cond = setting.model, setting.y, setting.cond
    latents = tools.to_space(model, setting.x, space, y, cond)
    expected = tools.from_space(model, latents, space, y, cond)
    ones, zeros = [1] * len(latents), [torch.zeros(shape) for shape in model.latent_shapes]
    for shift, keep in ((None, None), (None, ones), (zeros, None), (zeros, ones)):
        assert_close(tools.edited(model, latents, shift, keep, space, y, cond), expected, CONDITION)
    assert_close(tools.edited(model, latents, space=space, y=y, cond=cond), expected, CONDITION)


@pytest.mark.parametrize("name", ["one level", "three levels", "classes", "realnvp"])
def test_latents_that_are_kept_are_shifted(name: str) -> None:
    setting = Setting(name)
    latents, shift = setting.model.encode(setting.x), shifts(setting)
    expected = setting.model.decode([z + step for z, step in zip(latents, shift, strict=True)])
    assert_close(tools.edited(setting.model, latents, shift, None, "latent", setting.y), expected, CONDITION)


@pytest.mark.parametrize("name", NAMES)
def test_levels_of_which_nothing_is_kept_are_the_means_that_keep_levels_takes(name: str) -> None:
    setting = Setting(name, spread=CALM)
    model, y, cond = setting.model, setting.y, setting.cond
    latents = model.encode(setting.x, cond)
    n_levels = setting.config.n_levels
    for size in range(1, n_levels + 1):
        for kept in itertools.combinations(range(n_levels), size):
            keep = [float(level in kept) for level in range(n_levels)]
            found = tools.edited(model, latents, None, keep, "latent", y, cond)
            assert_close(found, tools.keep_levels(model, setting.x, kept, 0.0, y, cond), CONDITION)


@pytest.mark.parametrize("space", tools.SPACES)
@pytest.mark.parametrize("name", ["one level", "classes", "everything"])
def test_a_shift_is_what_manipulate_adds(name: str, space: str) -> None:
    setting = Setting(name, spread=CALM)
    model, y, cond = setting.model, setting.y, setting.cond
    direction = shifts(setting)
    latents = tools.to_space(model, setting.x, space, y, cond)
    expected = tools.manipulate(model, setting.x, direction, [-1.5], None, space, y, cond)[:, 0]
    found = tools.edited(model, latents, [-1.5 * part for part in direction], None, space, y, cond)
    assert_close(found, expected, CONDITION)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_kept_levels_are_those_of_the_loop_written_out(name: str, temperature: float) -> None:
    """The noise is drawn for every level, deepest first, and what is kept is not touched."""
    setting = Setting(name, spread=CALM)
    model, n_levels = setting.model, setting.config.n_levels
    latents = model.encode(setting.x, setting.cond)
    conds = model._check_cond(setting.cond, len(setting.x))
    for kept in ([0], [n_levels - 1], list(range(n_levels))):
        generator = torch.Generator().manual_seed(3)
        found = tools.keep_levels(model, setting.x, kept, temperature, setting.y, setting.cond, generator)
        generator.manual_seed(3)
        state = torch.empty(0)
        with torch.no_grad():
            for i in reversed(range(n_levels)):
                noise = scaled_noise(latents[i], temperature, generator)
                at_top = i == n_levels - 1
                prior = model.prior(noise, setting.y) if at_top else model._split(i).prior(state, conds[i])
                latent = latents[i] if i in kept else pgf.functional.gaussian_sample(noise, *prior)
                state = latent if at_top else torch.cat([state, latent], dim=1)
                state = model.levels[i].inverse(state, conds[i])[0]
        assert_close(found, state, CONDITION)


def test_priors_that_read_a_condition_get_it_at_their_size() -> None:
    """A vector is spread over the positions of each level, as in log_prob."""
    model = pgf.Glow(image_shape=(1, 8, 8), n_levels=3, n_steps=1, hidden=4, cond_channels=2, cond_splits=True).double()
    x, cond = torch.rand(3, 1, 8, 8, dtype=torch.float64) - 0.5, torch.randn(3, 2, dtype=torch.float64)
    model.initialize(x, cond)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(CALM * torch.randn_like(parameter))
    assert_close(tools.keep_levels(model, x, [0, 1, 2], cond=cond), x, CONDITION)
    mode = tools.edited(model, model.encode(x, cond), None, [0.0] * 3, "latent", cond=cond)
    assert_close(mode, model.sample(3, 0.0, cond=cond), CONDITION)
    other = tools.edited(model, model.encode(x, cond), None, [0.0] * 3, "latent", cond=cond + 1.0)
    assert float((mode - other).abs().max()) > 1e-3


@pytest.mark.parametrize("space", tools.SPACES)
def test_nothing_is_kept_of_the_argument_or_changed_in_it(space: str) -> None:
    setting = Setting("default", spread=CALM)
    latents, shift = tools.to_space(setting.model, setting.x, space), shifts(setting)
    before = [part.clone() for part in (*latents, *shift)]
    tools.edited(setting.model, latents, shift, [0.5, 0.0], space)
    assert all(torch.equal(old, new) for old, new in zip(before, (*latents, *shift), strict=True))


def test_single_precision_is_kept_and_a_shift_may_be_wider() -> None:
    setting = Setting("classes", spread=CALM)
    latents = tools.to_space(setting.model, setting.x, "latent", setting.y)
    shift = [torch.full(shape, 0.1, dtype=torch.float64) for shape in setting.model.latent_shapes]
    exact = tools.edited(setting.model, latents, shift, [0.5, 1.0], "latent", setting.y)
    model, narrow = setting.model.float(), [part.float() for part in latents]
    wide, same = (
        tools.edited(model, narrow, [part.to(dtype) for part in shift], [0.5, 1.0], "latent", setting.y)
        for dtype in (torch.float64, torch.float32)
    )
    assert_kernel_close(wide, same, exact)


@pytest.mark.parametrize("name", ["classes", "classes, fixed priors", "last checkerboard", "everything"])
def test_the_likeliest_class_is_the_one_of_the_highest_likelihood(name: str) -> None:
    setting = Setting(name, n=40, spread=0.3)
    n_classes = setting.config.n_classes
    assert n_classes is not None
    with torch.no_grad():
        each = [setting.model.log_prob(setting.x, torch.full((40,), label), setting.cond) for label in range(n_classes)]
    found = tools.likeliest_class(setting.model, setting.x, setting.cond)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.stack(each, 1).argmax(1))
    assert len(found.unique()) > 1  # or a constant would do
    assert tools.likeliest_class(
        setting.model, setting.x[:0], None if setting.cond is None else setting.cond[:0]
    ).shape == (0,)


def test_a_class_is_not_chosen_where_no_likelihood_is_finite() -> None:
    setting = Setting("classes", n=2)
    assert setting.model.prior.mean_log_sd is not None
    with torch.no_grad():
        setting.model.prior.mean_log_sd[0] = math.inf
    with pytest.raises(ValueError, match=r"^x: expected images with a finite log-likelihood, found 2 without one"):
        tools.likeliest_class(setting.model, setting.x)
