"""Paths from one image to another through the latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._core.errors import expect
from pyglow_fast._core.settings import Range
from pyglow_fast.latents.spaces import (
    DEFAULT_SPACE,
    check_finite,
    check_images,
    check_shares,
    check_space,
    from_space,
    to_space,
)
from pyglow_fast.layers.reshape import standardised
from pyglow_fast.models import Glow

# Between directions nearer to opposite than this rounding decides which great circle is taken: sin(angle) divides.
_OPPOSITE = 1e-3
_FRAMES = Range(least=2)  # both ends are frames


def linear(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b; exactly a at t = 0 and exactly b at t = 1."""
    return (1.0 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """n(t) (sin((1 - t) w) u + sin(t w) v) / sin w, per sample: u, v the unit vectors of a and b, w their angle.

    The norm n(t) = (1 - t)|a| + t|b| goes straight from one to the other, which a linear path falls short of: two
    independent latents are almost orthogonal, and their mean is shorter than both by sqrt(2). Where there is no great
    circle (parallel, opposite or zero vectors) the path is linear.

    Args:
        a, b: (N, ...), floating; one shape.
        t: 0 gives a and 1 gives b, exactly.

    Reference: Shoemake 1985; White 2016, "Sampling generative networks".

    Examples:
        >>> import torch
        >>> from pyglow_fast.latents import linear, slerp
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
        >>> round(slerp(a, b, 0.5).norm().item(), 3), round(linear(a, b, 0.5).norm().item(), 3)  # of norms 1 and 3
        (2.0, 1.581)
    """
    fits = a.is_floating_point() and a.dtype == b.dtype and a.dim() >= 1 and a.shape == b.shape
    expect(fits, "b", f"floating and like a, {a.dtype} {tuple(a.shape)}", f"{b.dtype} {tuple(b.shape)}")
    expect(0.0 <= t <= 1.0, "t", "a number in 0..1", t)
    first, second = a.flatten(1).double(), b.flatten(1).double()
    norms = [vector.norm(dim=1, keepdim=True) for vector in (first, second)]
    one = torch.ones_like(norms[0])
    u, v = (vector / norm.where(norm > 0, one) for vector, norm in zip((first, second), norms, strict=True))
    apart, together = (u - v).norm(dim=1, keepdim=True), (u + v).norm(dim=1, keepdim=True)
    angle = 2.0 * torch.atan2(apart, together)  # accurate where acos(u v) is not, near 0 and pi
    usable = (norms[0] > 0) & (norms[1] > 0) & (angle > 0) & (together > _OPPOSITE)
    norms = [norm.where(usable, one) for norm in norms]
    angle = angle.where(usable, one)
    norm = linear(norms[0], norms[1], t)
    weights = [
        (norm / own * (share * angle).sin() / angle.sin()).where(usable, share * one)
        for own, share in zip(norms, (1.0 - t, t), strict=True)
    ]
    return (weights[0] * first + weights[1] * second).reshape(a.shape).to(a.dtype)


@torch.no_grad()
def interpolate(
    model: Glow,
    a: Tensor,
    b: Tensor,
    frames: int = 8,
    spherical: bool = False,
    space: str = DEFAULT_SPACE,
    y: tuple[Tensor | None, Tensor | None] = (None, None),
    cond: Tensor | None = None,
) -> Tensor:
    """x(t) = decode(path(encode(a), encode(b), t)) for t = 0, 1 / (frames - 1), ..., 1: each a[i] on its way to b[i].

    In the noise of a model with classes, the mean and log sd of the top prior go linearly from those of the class of
    a to those of the class of b, so that the path is continuous and both ends are the images.

    Args:
        model, a, b: a Glow, and images (N, C, *spatial) in about [-0.5, 0.5].
        frames: images of the path, both ends included.
        spherical: on great circles, see :func:`slerp`; every level keeps its own norm.
        space, cond: as of :func:`to_space`.
        y: labels (N,) of a and of b, for a model with classes.

    Returns:
        (N, frames, C, *spatial); at t = 0 it is a and at t = 1 b, up to rounding.

    Reference: Kingma & Dhariwal 2018, figure 5 (linear).

    Examples:
        >>> import torch
        >>> from pyglow_fast import Glow
        >>> from pyglow_fast.latents import interpolate
        >>> model = Glow(image_shape=(1, 8, 8), n_levels=2, n_steps=1, hidden=4)
        >>> a, b = torch.rand(2, 3, 1, 8, 8) - 0.5
        >>> model.initialize(a)
        >>> path = interpolate(model, a, b, frames=5)
        >>> path.shape, torch.allclose(path[:, 0], a, atol=1e-4), torch.allclose(path[:, -1], b, atol=1e-4)
        (torch.Size([3, 5, 1, 8, 8]), True, True)
    """
    check_space(space)
    for name, x, labels in (("a", a, y[0]), ("b", b, y[1])):
        check_images(name, model, x, labels)
    expect(len(a) == len(b), "b", f"{len(a)} images, one for each of a", len(b))
    start, end = (to_space(model, x, space, labels, cond) for x, labels in zip((a, b), y, strict=True))
    return decode_path(model, start, end, even(frames), spherical, space, y, cond)


def even(frames: int) -> list[float]:
    """List 0, 1 / (frames - 1), ..., 1."""
    _FRAMES.check("frames", frames, whole=True)
    return [i / (frames - 1) for i in range(frames)]


@torch.no_grad()
def decode_path(
    model: Glow,
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    times: Sequence[float],
    spherical: bool = False,
    space: str = DEFAULT_SPACE,
    y: Sequence[Tensor | None] = (None, None),
    cond: Tensor | None = None,
) -> Tensor:
    """x(t) = decode(path(start, end, t)) for the ``times`` t in 0..1: :func:`interpolate` from latents.

    ``start`` and ``end`` are latents of N images each from :func:`to_space` in the same space.
    """
    points = check_shares("times", times)
    check_finite("start", start)
    check_finite("end", end, [tuple(level.shape) for level in start])
    between, found = slerp if spherical else linear, []
    for t in points:
        latents = [between(first, second, t) for first, second in zip(start, end, strict=True)]
        if space == "noise" and y[0] is not None:
            latents[-1] = _between_classes(model, latents[-1], y, t)
        found.append(from_space(model, latents, space, y[0], cond))
    return torch.stack(found, dim=1)


def _between_classes(model: Glow, top: Tensor, y: Sequence[Tensor | None], t: float) -> Tensor:
    """The noise that under the class of a gives the top latent of a prior between both classes."""
    (mean_a, log_sd_a), (mean_b, log_sd_b) = (model.prior(top, labels) for labels in y)
    latent = functional.gaussian_sample(top, linear(mean_a, mean_b, t), linear(log_sd_a, log_sd_b, t))
    return standardised(latent, mean_a, log_sd_a)
