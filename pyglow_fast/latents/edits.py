"""Edits along a direction in the latents, and towards the means of the priors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.latents.spaces import (
    DEFAULT_SPACE,
    check_finite,
    check_levels,
    check_numbers,
    check_space,
    decode_chosen,
    from_space,
    to_space,
)
from pyglow_fast.models import Glow
from pyglow_fast.models.prior import check_labels


class MeanLatent:
    """Running mean of latents that come in batches: mean_l = sum_n z_l(x_n) / N by level, summed in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, latents: Sequence[Tensor]) -> None:
        """Take one batch into the mean: one tensor (n, C, *spatial) a level.

        Raises:
            ValueError: another number or shape than before, or NaN or inf; the mean is then as it was.
        """
        expect(len(latents) > 0, "latents", "tensors (n, C, *spatial), one a level", "none")
        n = len(latents[0])
        shapes = [(n, *total.shape) for total in self._sums] or [(n, *latent.shape[1:]) for latent in latents]
        check_finite("latents", latents, shapes)
        sums = [latent.detach().double().sum(0) for latent in latents]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.count += n

    def without(self, part: MeanLatent) -> MeanLatent:
        """Subtract ``part``, whose images must be among this one's: the mean of the images that remain."""
        expect(part.count <= self.count, "part", f"at most {self.count} images, those of the whole", part.count)
        found = MeanLatent()
        found.count = self.count - part.count
        gone = part._sums or [torch.zeros_like(total) for total in self._sums]
        found._sums = [whole - some for whole, some in zip(self._sums, gone, strict=True)]
        return found

    def mean(self) -> list[Tensor]:
        """Give the mean so far: one tensor (C, *spatial) a level, float64."""
        expect(self.count > 0, "latents", "at least one image", "none")
        return [total / self.count for total in self._sums]


def attribute_direction(plus: MeanLatent, minus: MeanLatent) -> list[Tensor]:
    """direction_l = mean_l of images with an attribute minus mean_l of images without: (C, *spatial), float64.

    Both are means over training images in one space. Reference: Kingma & Dhariwal 2018, section 5.2.
    """
    with_it, without = plus.mean(), minus.mean()
    check_finite("minus", without, [tuple(level.shape) for level in with_it])
    return [a - b for a, b in zip(with_it, without, strict=True)]


@torch.no_grad()
def manipulate(
    model: Glow,
    x: Tensor,
    direction: Sequence[Tensor],
    strengths: Iterable[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    levels: Iterable[int] | None = None,
    space: str = DEFAULT_SPACE,
    y: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """x(s) = decode(encode(x) + s direction), in the chosen levels; the other levels stay as they are.

    Args:
        model, x: a Glow, and images (N, C, *spatial) in about [-0.5, 0.5].
        direction: one tensor (C, *spatial) a level, from :func:`attribute_direction` in the same space.
        strengths: s; 0 gives the image back.
        levels: which take part, 0 the shallowest; None: all.
        space, y, cond: as of :func:`to_space`. The noise of a model with classes does not hold the class: better decode
            with another y.

    Returns:
        (N, len(strengths), C, *spatial), with NaN or inf where an edit leads out of the model's range.

    Reference: Kingma & Dhariwal 2018, section 5.2.

    Examples:
        >>> import torch
        >>> from pyglow_fast import Glow
        >>> from pyglow_fast.latents import MeanLatent, attribute_direction, manipulate, to_space
        >>> model, x = Glow(image_shape=(1, 8, 8), n_levels=2, n_steps=1, hidden=4), torch.rand(6, 1, 8, 8) - 0.5
        >>> model.initialize(x)
        >>> smiling, serious = MeanLatent(), MeanLatent()
        >>> smiling.add(to_space(model, x[:3]))
        >>> serious.add(to_space(model, x[3:]))
        >>> manipulate(model, x[:2], attribute_direction(smiling, serious), strengths=(-1.0, 0.0, 1.0)).shape
        torch.Size([2, 3, 1, 8, 8])
    """
    values = check_numbers("strengths", strengths)
    latents = to_space(model, x, space, y, cond)
    chosen = check_levels(levels, len(latents))
    check_finite("direction", direction, model.latent_shapes)
    steps = [part if i in chosen else torch.zeros_like(part) for i, part in enumerate(direction)]
    shifts = ([s * step for step in steps] if s else None for s in values)
    return torch.stack([edited(model, latents, shift, None, space, y, cond) for shift in shifts], dim=1)


@torch.no_grad()
def edited(
    model: Glow,
    latents: Sequence[Tensor],
    shift: Sequence[Tensor] | None = None,
    keep: Sequence[float] | None = None,
    space: str = DEFAULT_SPACE,
    y: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """x' = decode(latents'), eps'_l = keep_l eps_l + shift_l, or z'_l = mean_l + keep_l (z_l - mean_l) + shift_l.

    The first is the edit of the noise, the second that of the latents; mean_l is then that of the level's prior given
    the deeper levels as they are now, so that ``keep`` draws an image towards what is likeliest. Where keep_l is 1 no
    mean is needed: the latents are z_l + shift_l to the bit.

    Args:
        model, latents: a Glow, and latents of N images from :func:`to_space` in the same space.
        shift: one tensor (C, *spatial) a level, such as the sum over attributes of strength times direction; None: 0.
        keep: one number in 0..1 a level, the share of the image's own latents that is kept; None: 1.
        space, y, cond: as of :func:`to_space`; y chooses the prior of the top level.

    Returns:
        (N, C, *spatial), with NaN or inf where an edit leads out of the model's range.
    """
    check_space(space)
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    check_finite("latents", latents)
    model._check_latents(list(latents))
    check_labels(y, len(latents[0]), model.config.n_classes)
    shares = [1.0] * len(latents) if keep is None else check_numbers("keep", keep)
    expect(len(shares) == len(latents), "keep", f"{len(latents)} numbers, one a level", len(shares))
    for share in shares:
        expect(0.0 <= share <= 1.0, "keep", "numbers in 0..1", share)
    steps: list[Tensor | None] = [None] * len(latents)
    if shift is not None:
        check_finite("shift", shift, model.latent_shapes)
        cast = [part.to(z) for part, z in zip(shift, latents, strict=True)]
        check_finite("shift", cast)  # a narrower dtype may not hold what a wider one does
        steps = list(cast)

    def moved(level: int, z: Tensor) -> Tensor:
        step = steps[level]
        return z if step is None else z + step

    if space == "latent" and min(shares) < 1.0:

        def choose(level: int, prior: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
            z, share = latents[level], shares[level]
            if share < 1.0:
                mean, _ = prior()
                z = mean + share * (z - mean)
            return moved(level, z)

        return decode_chosen(model, latents, y, cond, choose)
    kept = (z if share == 1.0 else share * z for z, share in zip(latents, shares, strict=True))
    return from_space(model, [moved(level, z) for level, z in enumerate(kept)], space, y, cond)
