"""Laws of the tools in latent space, over models of every kind and both spaces, against the formulas written out.

Results are compared within a tolerance: products of matrices depend in their last bits on where memory was placed.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.glow_settings import CALM, CONDITION, Setting
from support.helpers import assert_close, assert_kernel_close
from torch import Tensor

from pyglow_fast import latents as tools
from pyglow_fast.models.condition import fitted

NAMES = ["one level", "default", "three levels", "fixed priors", "classes", "vector", "everything", "one dimension"]
FULL = [*("classes, fixed priors", "map", "checkerboard", "last checkerboard", "realnvp")]
OF_ALL = pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)])
OF_SPACES = pytest.mark.parametrize("space", tools.SPACES)


def shifts(setting: Setting) -> list[Tensor]:
    """A small random step for each level."""
    return [0.05 * torch.randn(shape, dtype=torch.float64) for shape in setting.model.latent_shapes]


def decoded_by_hand(setting: Setting, latents: list[Tensor], shift: list[Tensor], keep: list[float]) -> Tensor:
    """z'_l = mean_l + keep_l (z_l - mean_l) + shift_l, from the deepest level up."""
    model, top = setting.model, setting.config.n_levels - 1
    conds, state = model._check_cond(setting.cond, len(latents[0])), torch.empty(0)
    for i in range(top, -1, -1):
        if i == top:
            mean = model.prior(latents[i], setting.y)[0]
        else:
            mean = model.splits[i].prior(state, fitted(conds[i], state.shape[2:]))[0]
        z = keep[i] * latents[i] + (1.0 - keep[i]) * mean + shift[i]
        state = z if i == top else torch.cat([state, z], dim=1)
        state = model.levels[i].inverse(state, conds[i], {})[0]
    return state


@OF_SPACES
@OF_ALL
def test_whatever_changes_nothing_gives_the_image_back(name: str, space: str) -> None:
    """Decoding, an edit that keeps all, and both ends of a path."""
    setting = Setting(name)
    model, x, y, cond = setting.model, setting.x, setting.y, setting.cond
    latents = tools.to_space(model, x, space, y, cond)
    assert_close(tools.from_space(model, latents, space, y, cond), x, CONDITION)
    assert_close(tools.edited(model, latents, None, [1.0] * len(latents), space, y, cond), x, CONDITION)
    other, labels = x[[1, 0, 3, 2]], None if y is None else y[[1, 0, 3, 2]]
    for spherical in (False, True):
        path = tools.interpolate(model, x, other, 3, spherical, space, (y, labels), cond)
        assert path.shape == (len(x), 3, *setting.config.image_shape)
        assert_close(path[:, 0], x, CONDITION)
        assert_close(path[:, -1], other, CONDITION)


@OF_ALL
def test_an_edit_follows_its_formula(name: str) -> None:
    """In both spaces, with shares that keep all, a part and nothing of a level."""
    setting = Setting(name, spread=CALM)
    model, y, cond, shift = setting.model, setting.y, setting.cond, shifts(setting)
    latents, noise = model.encode(setting.x, cond), model.to_noise(setting.x, y, cond)[0]
    n_levels = len(latents)
    for keep in ([0.0] * n_levels, [0.5] * n_levels, [1.0, *[0.3] * (n_levels - 1)], [*[0.3] * (n_levels - 1), 1.0]):
        found = tools.edited(model, latents, shift, keep, "latent", y, cond)
        assert_close(found, decoded_by_hand(setting, latents, shift, keep), CONDITION)
        expected = [share * eps + step for share, eps, step in zip(keep, noise, shift, strict=True)]
        found = tools.edited(model, noise, shift, keep, "noise", y, cond)
        assert_close(found, model.from_noise(expected, y, cond)[0], CONDITION)


@OF_SPACES
def test_a_path_is_straight_in_its_space(space: str) -> None:
    """And its points are those of the times, in any order."""
    setting = Setting("default")
    a, b = setting.x[:2], setting.x[2:]
    path = tools.interpolate(setting.model, a, b, 5, space=space)
    first, last = (tools.to_space(setting.model, x, space) for x in (a, b))
    for i in range(5):
        for level, start, end in zip(tools.to_space(setting.model, path[:, i], space), first, last, strict=True):
            assert_close(level, start + i / 4 * (end - start), CONDITION)
    assert_close(tools.decode_path(setting.model, first, last, (0.75, 0.0), space=space), path[:, [3, 0]], CONDITION)
    for wrong in ([1.5], [math.nan], []):
        with pytest.raises(ValueError, match=r"^times: expected"):
            tools.decode_path(setting.model, first, last, wrong, space=space)


def test_between_classes_the_top_prior_goes_along() -> None:
    setting = Setting("classes")
    a, b, labels = setting.x[:2], setting.x[2:], torch.arange(4) % 3
    y = labels[:2], labels[1:3]
    path = tools.interpolate(setting.model, a, b, 5, space="noise", y=y)
    (mean_a, log_sd_a), (mean_b, log_sd_b) = (setting.model.prior(setting.x, part) for part in y)
    tops = [setting.model.encode(x)[-1] for x in (a, b)]
    noise = [(tops[0] - mean_a) / log_sd_a.exp(), (tops[1] - mean_b) / log_sd_b.exp()]
    for i in range(5):
        t = i / 4
        mean, log_sd = (1 - t) * mean_a + t * mean_b, (1 - t) * log_sd_a + t * log_sd_b
        expected = mean + log_sd.exp() * ((1 - t) * noise[0] + t * noise[1])
        assert_close(setting.model.encode(path[:, i])[-1], expected, CONDITION)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slerp_keeps_the_norm_and_turns_evenly(dtype: torch.dtype) -> None:
    a, b = torch.randn(6, 3, 4, 5, dtype=dtype), 3 * torch.randn(6, 3, 4, 5, dtype=dtype)
    points = [tools.slerp(a, b, i / 4) for i in range(5)]
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    flat = torch.stack([point.flatten(1).double() for point in points])
    norms = flat.norm(dim=2, keepdim=True)
    assert torch.allclose(norms[1:4], torch.stack([torch.lerp(norms[0], norms[4], i / 4) for i in (1, 2, 3)]), 1e-5)
    angles = (flat[:-1] * flat[1:] / norms[:-1] / norms[1:]).sum(2).acos()
    assert torch.allclose(angles, angles.mean(0, keepdim=True).expand_as(angles), rtol=1e-3)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_where_there_is_no_great_circle(t: float) -> None:
    """Parallel, opposite and zero vectors go straight, each without harm to the ordinary one beside them."""
    u, v = torch.randn(2, 30, dtype=torch.float64)
    zero = torch.zeros_like(u)
    a, b = torch.stack([u, u, u, zero, zero, u]), torch.stack([2 * u, u, -u, u, zero, v])
    found = tools.slerp(a, b, t)
    assert torch.allclose(found[:5], ((1 - t) * a + t * b)[:5], atol=1e-12)
    assert torch.equal(found[5:], tools.slerp(a[5:], b[5:], t))
    near = u + 1e-9 * v  # acos of the product would not tell them apart
    assert torch.allclose(tools.slerp(u[None], near[None], t), ((1 - t) * u + t * near)[None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["classes", "classes, fixed priors", "last checkerboard", "everything"])
def test_the_likeliest_class_is_the_one_of_the_highest_likelihood(name: str) -> None:
    setting = Setting(name, n=40, spread=0.3)
    labels = range(setting.config.n_classes or 0)
    with torch.no_grad():
        each = [setting.model.log_prob(setting.x, torch.full((40,), label), setting.cond) for label in labels]
        found = setting.model.class_log_probs(setting.x, setting.cond)
    assert torch.allclose(found, torch.stack(each, 1).double(), rtol=1e-5)
    found = tools.likeliest_class(setting.model, setting.x, setting.cond)
    assert torch.equal(found, torch.stack(each, 1).argmax(1))
    assert len(found.unique()) > 1  # or a constant would do


def test_a_class_is_not_chosen_where_no_likelihood_is_finite() -> None:
    setting = Setting("classes", n=2)
    with torch.no_grad():
        setting.model.prior.mean_log_sd[0] = math.inf
    with pytest.raises(ValueError, match=r"^x: expected images with a finite log-likelihood, found 2 without one"):
        tools.likeliest_class(setting.model, setting.x)


def test_it_computes_in_full_precision_whatever_the_model_is_set_to() -> None:
    """Both ends of a path would be off by 1e-3 in 16 bits; and a shift may be of a wider dtype than the latents."""
    setting = Setting("classes", spread=CALM)
    latents, shift = setting.model.encode(setting.x), shifts(setting)
    exact = tools.edited(setting.model, latents, shift, [0.5, 1.0], "latent", setting.y)
    model, x, narrow = setting.model.float(), setting.x.float(), [part.float() for part in latents]
    model.precision = "bf16"
    for space in tools.SPACES:
        path = tools.interpolate(model, x, x.flip(0), 2, space=space, y=(setting.y, setting.y.flip(0)))
        assert float((path[:, 1] - x.flip(0)).abs().max()) < 1e-4
    assert model.precision == "bf16"
    wide, same = (
        tools.edited(model, narrow, [part.to(dtype) for part in shift], [0.5, 1.0], "latent", setting.y)
        for dtype in (torch.float64, torch.float32)
    )
    assert_kernel_close(wide, same, exact)
