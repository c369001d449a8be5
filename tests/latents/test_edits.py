"""Means of latents, directions, edits and their scores."""

from __future__ import annotations

import math

import pytest
import torch
from support.covering import pairs
from support.glow_settings import CONDITION, Setting
from support.helpers import assert_close, tolerance

from pyglow_fast import latents as tools


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 0, 7], [6, 4]])
def test_a_streamed_mean_is_the_mean(sizes: list[int]) -> None:
    latents = [torch.randn(10, 3, 4, dtype=torch.float64), torch.randn(10, 5, 2, 2, dtype=torch.float64)]
    streamed = tools.MeanLatent()
    for parts in zip(*(level.split(sizes) for level in latents), strict=True):
        streamed.add(parts)
    assert streamed.count == 10
    for found, level in zip(streamed.mean(), latents, strict=True):
        assert found.dtype == torch.float64
        assert torch.allclose(found, level.mean(0), rtol=1e-14, atol=1e-15)


def test_a_mean_of_single_precision_does_not_lose_small_terms() -> None:
    streamed = tools.MeanLatent()
    for value in [2.0**25, *[1.0] * 64]:  # in float32, 2^25 + 1 is 2^25
        streamed.add([torch.full((1, 1), value)])
    assert float(streamed.mean()[0]) == (2.0**25 + 64) / 65


def test_a_refused_batch_leaves_the_mean_as_it_was() -> None:
    streamed = tools.MeanLatent()
    streamed.add([torch.ones(2, 3), torch.ones(2, 1)])
    for bad in ([torch.ones(2, 3), torch.full((2, 1), math.nan)], [torch.ones(2, 3)], [torch.ones(2, 3)] * 2, []):
        with pytest.raises(ValueError, match="latents"):
            streamed.add(bad)
    assert streamed.count == 2
    assert [level.tolist() for level in streamed.mean()] == [[1.0] * 3, [1.0]]


def test_the_mean_of_the_others() -> None:
    """What is left when some are taken out; nothing changes in either."""
    latents = [torch.randn(10, 3, 4), torch.randn(10, 5, 2, 2)]
    whole, part, none = tools.MeanLatent(), tools.MeanLatent(), tools.MeanLatent()
    whole.add(latents)
    part.add([level[[1, 4, 5]] for level in latents])
    others = whole.without(part)
    assert (whole.count, part.count, others.count) == (10, 3, 7)
    for found, level in zip(others.mean(), latents, strict=True):
        wanted = level[[0, 2, 3, 6, 7, 8, 9]].double().mean(0)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-14)  # sums in float64 of values of size 1
    same = whole.without(none)
    same.add([level[:1] for level in latents])
    assert (whole.count, same.count) == (10, 11)
    assert torch.allclose(whole.mean()[0], latents[0].double().mean(0), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="latents: expected at least one image, found none"):
        whole.without(whole).mean()
    with pytest.raises(ValueError, match="part: expected at most 3 images, those of the whole, found 10"):
        part.without(whole)
    other = tools.MeanLatent()
    other.add([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"part: expected shapes \[\(3, 4\), \(5, 2, 2\)\], found \[\(3,\)\]"):
        whole.without(other)


def test_direction() -> None:
    plus, minus = tools.MeanLatent(), tools.MeanLatent()
    plus.add([torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    minus.add([torch.tensor([[1.0, 1.0]])])
    assert tools.attribute_direction(plus, minus)[0].tolist() == [1.0, 2.0]


@pytest.mark.full
@pairs(
    pytest.mark.parametrize("space", tools.SPACES),
    pytest.mark.parametrize("name", ["default", "classes", "everything"]),
    pytest.mark.parametrize("levels", [None, [0], [1], [1, 0, 1]]),
)
def test_an_edit_moves_the_chosen_levels_by_the_strength(name: str, space: str, levels: list[int] | None) -> None:
    setting = Setting(name)
    direction = [0.05 * torch.randn(shape, dtype=torch.float64) for shape in setting.model.latent_shapes]
    strengths = [-1.5, 0.0, 1.0]
    edited = tools.manipulate(
        setting.model, setting.x, direction, strengths, levels, space, y=setting.y, cond=setting.cond
    )
    assert edited.shape == (len(setting.x), 3, *setting.config.image_shape)
    assert_close(edited[:, 1], setting.x, CONDITION)
    before = tools.to_space(setting.model, setting.x, space, setting.y, setting.cond)
    for i, strength in enumerate(strengths):
        after = tools.to_space(setting.model, edited[:, i], space, setting.y, setting.cond)
        for level, (old, new, step) in enumerate(zip(before, after, direction, strict=True)):
            moved = strength if levels is None or level in levels else 0.0
            assert_close(new, old + moved * step, CONDITION)


def test_noise_and_latents_are_other_edits() -> None:
    """Noise is measured in the priors' deviations, so the same direction is another step."""
    setting = Setting("default")
    direction = [torch.full(shape, 0.1, dtype=torch.float64) for shape in setting.model.latent_shapes]
    noise, latent = (tools.manipulate(setting.model, setting.x, direction, [1.0], space=s) for s in tools.SPACES)
    assert float((noise - latent).abs().max()) > 1e-3


def test_score_by_hand() -> None:
    target = torch.zeros(2, 1, 2, 2)
    unedited = torch.stack([torch.full((1, 2, 2), 0.2), torch.full((1, 2, 2), 0.4)])
    edited = torch.stack([torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 0.4)])
    found = tools.edit_score(edited.double(), target.double(), unedited.double())
    assert math.isclose(found.distance, 0.25, rel_tol=1e-6)
    assert math.isclose(found.standard_error, 0.15, rel_tol=1e-6)  # of 0.1 and 0.4
    assert math.isclose(found.gain, 0.05, rel_tol=1e-6)  # of 0.1 and 0
    assert math.isclose(found.gain_error, 0.05, rel_tol=1e-6)
    assert (found.images, found.not_finite) == (2, 0)
    assert math.isnan(tools.edit_score(edited[:1], target[:1], unedited[:1]).standard_error)


def test_an_edit_that_is_not_finite_is_scored_as_it_is_shown_and_counted() -> None:
    target = torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64)
    edited = torch.tensor([math.nan, math.inf, 7.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    found = tools.edit_score(edited, target, torch.zeros_like(target))
    assert found.not_finite == 2
    assert math.isclose(found.distance, 0.5 / 3)  # grey, white, white


def test_a_known_attribute_is_found() -> None:
    """Images with and without a shift of the latents: the direction is that shift, the edit the true target."""
    setting = Setting("default", n=6)
    without = setting.model.encode(setting.x)
    shift = [0.1 * torch.randn(shape, dtype=torch.float64) for shape in setting.model.latent_shapes]
    with_it = setting.model.decode([z + step for z, step in zip(without, shift, strict=True)])
    plus, minus = tools.MeanLatent(), tools.MeanLatent()
    for part in (slice(0, 2), slice(2, 4)):
        plus.add(setting.model.encode(with_it[part]))
        minus.add(setting.model.encode(setting.x[part]))
    direction = tools.attribute_direction(plus, minus)
    edited = tools.manipulate(setting.model, setting.x[4:], direction, [1.0], space="latent")[:, 0]
    assert_close(edited, with_it[4:], CONDITION)
    # In the range that pixels are shown in: a random shift may lead out of it.
    assert tools.edit_score(edited, with_it[4:], setting.x[4:]).distance < tolerance(96, CONDITION)
