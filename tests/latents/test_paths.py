"""Paths between images: exact ends, straight or on great circles, in both spaces."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.covering import pairs
from support.glow_settings import CONDITION, Setting
from support.helpers import assert_close, tolerance
from torch import Tensor

from pyglow_fast import latents as tools

NAMES = ["default", "one level", "fixed priors", "classes", "everything"]


def halves(setting: Setting) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """a, b, their labels (which differ), and a condition that both have."""
    y = None if setting.y is None else (setting.y[:2], setting.y[1:3])
    return setting.x[:2], setting.x[2:], y, None if setting.cond is None else setting.cond[:2]


@pytest.mark.parametrize("space", tools.SPACES)
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name: str, space: str) -> None:
    setting = Setting(name)
    found = tools.to_space(setting.model, setting.x, space, setting.y, setting.cond)
    back = tools.from_space(setting.model, found, space, setting.y, setting.cond)
    assert_close(back, setting.x, CONDITION)
    flat = torch.cat([level.flatten(1) for level in found], dim=1)
    same = torch.allclose(flat, setting.standardised(setting.x), atol=tolerance(flat.shape[1], CONDITION))
    assert same == (space == "noise" or name == "fixed priors")


@pytest.mark.parametrize("name", ["default", "classes"])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("space", tools.SPACES)
def test_any_points_of_the_path(name: str, space: str, spherical: bool) -> None:
    """Those at the times of the frames are the frames, in any order; nothing outside of the path."""
    setting = Setting(name)
    a, b, y, _ = halves(setting)
    frames = tools.interpolate(setting.model, a, b, 5, spherical, space, y)
    times = tools.interpolate(setting.model, a, b, 99, spherical, space, y, times=(0.75, 0.0, 1.0))
    assert_close(times, frames[:, [3, 0, 4]], CONDITION)
    for wrong in ([1.5], [-0.25, 0.5], [math.nan], []):
        with pytest.raises(ValueError, match=r"^times: expected"):
            tools.interpolate(setting.model, a, b, space=space, y=y, times=wrong)


@pairs(
    pytest.mark.parametrize("spherical", [False, True]),
    pytest.mark.parametrize("space", tools.SPACES),
    pytest.mark.parametrize("name", NAMES),
)
def test_the_ends_are_the_images(name: str, space: str, spherical: bool) -> None:
    setting = Setting(name)
    a, b, y, cond = halves(setting)
    path = tools.interpolate(setting.model, a, b, 4, spherical, space, y, cond)
    assert path.shape == (2, 4, *setting.config.image_shape)
    assert_close(path[:, 0], a, CONDITION)
    assert_close(path[:, -1], b, CONDITION)


@pytest.mark.parametrize("space", tools.SPACES)
def test_the_path_is_straight_in_its_space(space: str) -> None:
    setting = Setting("default")
    a, b = setting.x[:2], setting.x[2:]
    path = tools.interpolate(setting.model, a, b, 5, space=space)
    first, last = (tools.to_space(setting.model, x, space) for x in (a, b))
    for i in range(5):
        found = tools.to_space(setting.model, path[:, i], space)
        for level, start, end in zip(found, first, last, strict=True):
            assert_close(level, start + i / 4 * (end - start), CONDITION)


def test_between_classes_the_top_prior_goes_along() -> None:
    """Independently: the prior's mean and log sd by hand, the noise from the latent."""
    setting = Setting("classes")
    a, b, y, _ = halves(setting)
    assert y is not None
    path = tools.interpolate(setting.model, a, b, 5, space="noise", y=y)
    (mean_a, log_sd_a), (mean_b, log_sd_b) = (setting.model.prior(setting.x, labels) for labels in y)
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
    norms = [x.flatten(1).double().norm(dim=1) for x in (a, b)]
    points = [tools.slerp(a, b, i / 4) for i in range(5)]
    assert points[1].dtype == dtype
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    units = []
    for i, point in enumerate(points):
        flat = point.flatten(1).double()
        expected = (1 - i / 4) * norms[0] + i / 4 * norms[1]
        assert torch.allclose(flat.norm(dim=1), expected, rtol=tolerance(60, dtype=dtype))
        units.append(flat / flat.norm(dim=1, keepdim=True))
    angles = torch.stack([(u * v).sum(1).acos() for u, v in itertools.pairwise(units)])
    whole = (units[0] * units[-1]).sum(1).acos()
    assert torch.allclose(angles, whole / 4, rtol=1e-3 if dtype == torch.float32 else 1e-9)


def test_slerp_by_hand() -> None:
    a, b = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(tools.slerp(a, b, 0.5), torch.full((1, 2), math.sqrt(0.5), dtype=torch.float64))
    third = torch.tensor([[math.cos(math.pi / 6), math.sin(math.pi / 6)]], dtype=torch.float64)
    assert torch.allclose(tools.slerp(a, b, 1 / 3), third)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slerp_where_there_is_no_great_circle(dtype: torch.dtype, t: float) -> None:
    """Parallel, opposite and zero vectors go straight, each without harm to the ordinary one beside them."""
    u, v = torch.randn(2, 30, dtype=dtype)
    zero = torch.zeros_like(u)
    a = torch.stack([u, u, u, zero, u, zero, u])
    b = torch.stack([2 * u, u, -u, u, zero, zero, v])
    found = tools.slerp(a, b, t)
    assert torch.allclose(found[:6], ((1 - t) * a + t * b)[:6], atol=tolerance(30, dtype=dtype))
    assert torch.equal(found[6:], tools.slerp(a[6:], b[6:], t))


def test_slerp_of_nearly_parallel_vectors_is_accurate() -> None:
    u, v = torch.randn(2, 1, 50, dtype=torch.float64)
    for size in (1e-3, 1e-6, 1e-9, 1e-12):
        near = u + size * v
        assert torch.allclose(tools.slerp(u, near, 0.5), (u + near) / 2, atol=max(size**2 * 10, tolerance(50)))


def test_every_level_keeps_its_own_norm() -> None:
    a, b = ([torch.randn(2, c, 4, dtype=torch.float64) for c in (2, 30)] for _ in range(2))
    for i, point in enumerate(tools.interpolate_latents(a, b, 5, spherical=True)):
        for level, first, last in zip(point, a, b, strict=True):
            norms = [x.flatten(1).norm(dim=1) for x in (first, last)]
            assert torch.allclose(level.flatten(1).norm(dim=1), torch.lerp(norms[0], norms[1], i / 4))


def test_it_computes_in_full_precision() -> None:
    """A model set to 16 bits for training is edited in 32: both ends would be off by 1e-3 otherwise."""
    setting = Setting("classes")
    model = setting.model.float()
    model.precision = "bf16"
    a, b, y, _ = halves(setting)
    for space in tools.SPACES:
        path = tools.interpolate(model, a.float(), b.float(), 2, space=space, y=y)
        assert float((path[:, 1] - b.float()).abs().max()) < 1e-4
    assert model.precision == "bf16"
