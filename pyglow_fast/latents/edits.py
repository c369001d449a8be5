"""Edits along a direction in the latents, and how near they come to a known target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments
from pyglow_fast.latents.spaces import (
    DEFAULT_SPACE,
    check_finite,
    check_levels,
    check_numbers,
    check_parts,
    check_space,
    decode_chosen,
    decode_each,
    from_space,
    to_space,
)
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.models import Glow
from pyglow_fast.models.prior import check_labels


class MeanLatent:
    """Running mean of latents that come in batches: mean_l = sum_n z_l(x_n) / N by level, summed in float64.

    Examples:
        >>> import torch
        >>> from pyglow_fast.latents import MeanLatent
        >>> mean = MeanLatent()
        >>> mean.add([torch.zeros(3, 6, 4, 4)])  # of a model with one level
        >>> mean.add([torch.full((1, 6, 4, 4), 8.0)])
        >>> mean.mean()[0].unique()  # of 0, 0, 0 and 8
        tensor([2.], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, latents: Sequence[Tensor]) -> None:
        """Take one batch into the mean: one tensor (n, C, *spatial) a level.

        Raises:
            ValueError: another number or shape than before, or NaN or inf; the mean is then as it was.
        """
        check_finite("latents", latents)
        expect(len(latents) > 0 and latents[0].dim() >= 1, "latents", "tensors (n, C, *spatial), one a level", "none")
        n = len(latents[0])
        shapes = [tuple(total.shape) for total in self._sums] or [tuple(latent.shape[1:]) for latent in latents]
        expect(len(latents) == len(shapes), "latents", f"{len(shapes)} tensors, as before", len(latents))
        for i, (latent, shape) in enumerate(zip(latents, shapes, strict=True)):
            expect(tuple(latent.shape) == (n, *shape), f"latents[{i}]", f"shape {(n, *shape)}", tuple(latent.shape))
        sums = [latent.detach().double().sum(0) for latent in latents]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self.count += n

    def without(self, part: MeanLatent) -> MeanLatent:
        """Subtract ``part``, whose images must be among this one's: the mean of the images that remain.

        Raises:
            ValueError: part has more images than this, or latents of other shapes.
        """
        expect(part.count <= self.count, "part", f"at most {self.count} images, those of the whole", part.count)
        found = MeanLatent()
        found.count = self.count - part.count
        if part.count == 0:
            found._sums = list(self._sums)
            return found
        shapes, own = ([tuple(total.shape) for total in side._sums] for side in (part, self))
        expect(shapes == own, "part", f"shapes {own}", shapes)
        found._sums = [whole - some for whole, some in zip(self._sums, part._sums, strict=True)]
        return found

    def mean(self) -> list[Tensor]:
        """Give the mean so far: one tensor (C, *spatial) a level, float64.

        Raises:
            ValueError: there was no image.
        """
        expect(self.count > 0, "latents", "at least one image", "none")
        return [total / self.count for total in self._sums]


def attribute_direction(plus: MeanLatent, minus: MeanLatent) -> list[Tensor]:
    """direction_l = mean_l of images with an attribute minus mean_l of images without.

    Where the images are pairs that differ in the attribute alone, that is the mean difference of the pairs.

    Args:
        plus, minus: means over training images in one space.

    Returns:
        One tensor (C, *spatial) a level, float64.

    Raises:
        ValueError: a mean of no images, or means of other shapes.

    Reference: Kingma & Dhariwal 2018, section 5.2 (semantic manipulation).
    """
    for name, side in (("plus", plus), ("minus", minus)):
        expect(isinstance(side, MeanLatent), name, "a MeanLatent", type(side).__name__)
        expect(side.count > 0, name, "a mean of at least one image", "none")
    with_it, without = plus.mean(), minus.mean()
    shapes, found = ([tuple(level.shape) for level in side] for side in (with_it, without))
    expect(shapes == found, "minus", f"shapes {shapes}, as in plus", found)
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
        model: a Glow.
        x: images (N, C, *spatial), in about [-0.5, 0.5].
        direction: one tensor (C, *spatial) a level, from :func:`attribute_direction` in the same space.
        strengths: s; 0 gives the image back.
        levels: which take part, 0 the shallowest; None: all.
        space: "noise" or "latent", see :func:`to_space`. Noise is the default: on emoji with known targets both come
            as near, but steps in noise, which are counted in deviations of the priors, seldom make the inverse run
            away.
        y: labels (N,) of x, for a model with classes. Its noise does not hold the class: better decode with another y.
        cond: condition, if the model has one.

    Returns:
        (N, len(strengths), C, *spatial). NaN or inf where an edit leads out of the range that the inverse of the
        affine couplings can follow, in float64 as well.

    Raises:
        ValueError: a direction that does not fit the model or is not finite, strengths that are not finite numbers,
            levels that the model does not have, or images that do not fit it.

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
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    values = check_numbers("strengths", strengths)
    chosen = check_levels(levels, len(model.latent_shapes))
    check_parts("direction", direction, model.latent_shapes)
    pairs = list(zip(to_space(model, x, space, y, cond), direction, strict=True))
    top = max(float(direction[i].abs().max()) for i in chosen) * max(map(abs, values))
    expect(top <= torch.finfo(pairs[0][0].dtype).max, "strengths", "numbers whose edit can be held", values)
    variants = [
        [_plus(z, s * part.to(z) if i in chosen and s != 0.0 else None) for i, (z, part) in enumerate(pairs)]
        for s in values
    ]
    return decode_each(model, variants, space, y, cond)


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
        model: a Glow.
        latents: of N images, one tensor (N, C, *spatial) a level, shallowest first, from :func:`to_space` in the same
            space.
        shift: one tensor (C, *spatial) a level, such as the sum over attributes of strength times direction; None: 0.
        keep: one number in 0..1 a level, the share of the image's own latents that is kept; None: 1.
        space: "noise" or "latent".
        y: labels (N,), for a model with classes: they choose the prior of the top level.
        cond: condition, if the model has one.

    Returns:
        (N, C, *spatial). Without an edit what :func:`from_space` gives under torch.no_grad, to the bit. NaN or inf
        where an edit leads out of the range that the inverse of the affine couplings can follow.

    Raises:
        ValueError: an unknown space, latents or a shift that do not fit the model or are not finite, shares that are
            not one number in 0..1 a level, or y or cond that do not fit.
    """
    check_space(space)
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    check_finite("latents", latents)
    model._check_latents(list(latents))
    check_labels(y, len(latents[0]), model.config.n_classes)
    shares = _shares(keep, len(latents))
    own: Sequence[Tensor | None] = [None] * len(latents)
    if shift is not None:
        check_parts("shift", shift, model.latent_shapes)
        cast = [part.to(z) for part, z in zip(shift, latents, strict=True)]
        check_finite("shift", cast)  # a narrower dtype may not hold what a wider one does
        own = cast
    if space == "latent" and min(shares) < 1.0:

        def choose(level: int, prior: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
            z, share = latents[level], shares[level]
            if share < 1.0:
                mean, _ = prior()
                z = mean + share * (z - mean)
            return _plus(z, own[level])

        return decode_chosen(model, latents, y, cond, choose)
    parts = zip(latents, shares, own, strict=True)
    now = [_plus(z if share == 1.0 else share * z, step) for z, share, step in parts]
    return from_space(model, now, space, y, cond)


def _plus(z: Tensor, step: Tensor | None) -> Tensor:
    """The one way a latent is shifted: z + step, and z itself where there is none."""
    return z if step is None else z + step


def _shares(keep: Sequence[float] | None, n_levels: int) -> list[float]:
    """One number in 0..1 a level; 1 for None."""
    if keep is None:
        return [1.0] * n_levels
    shares = check_numbers("keep", keep)
    expect(len(shares) == n_levels, "keep", f"{n_levels} numbers, one a level", len(shares))
    for share in shares:
        expect(0.0 <= share <= 1.0, "keep", "numbers in 0..1", share)
    return shares


@dataclass(frozen=True)
class EditScore:
    """Distances that say how far edited images are from what they should be.

    Args:
        distance: RMSE of the edit to its target, mean over the images.
        standard_error: of that mean over the images; NaN for one image.
        gain: RMSE of the unedited image to the target minus that of the edit, mean over the images: above 0 the edit
            is better than no edit.
        gain_error: standard error of the gain.
        images: how many.
        not_finite: of how many the edit holds NaN or inf.

    Examples:
        >>> import torch
        >>> from pyglow_fast.latents import EditScore, edit_score
        >>> target = torch.zeros(2, 3, 4, 4)
        >>> score: EditScore = edit_score(target + 0.1, target, unedited=target + 0.3)
        >>> print(f"{score.distance:.2f} from the target, {score.gain:.2f} nearer than the image before")
        0.10 from the target, 0.20 nearer than the image before
    """

    distance: float
    standard_error: float
    gain: float
    gain_error: float
    images: int
    not_finite: int


def rmse(x: Tensor, target: Tensor) -> Tensor:
    """sqrt(mean over C, H, W of (x - target)^2), (N,), float64: pixels on a scale from 0 to 1, as they are shown.

    Args:
        x, target: (N, C, *spatial) in about [-0.5, 0.5]; what is outside shows as the nearer end, NaN as mid-grey.
    """
    shown = [part.double().nan_to_num(nan=0.0).clamp(-0.5, 0.5) for part in (x, target)]
    return (shown[0] - shown[1]).square().flatten(1).mean(1).sqrt()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Compute the mean of (N,) values and its standard error, sqrt(sum (v - mean)^2 / (N - 1) / N); NaN for N = 1."""
    found = Moments.of(values)
    return found.mean, found.standard_error


def edit_score(edited: Tensor, target: Tensor, unedited: Tensor) -> EditScore:
    """Score RMSE(edited, target) beside RMSE(unedited, target), the baseline: what doing nothing costs.

    An edit that is not finite is scored as the mid-grey that it is shown as, and counted.

    Args:
        edited, target, unedited: images (N, C, *spatial) in about [-0.5, 0.5].

    Raises:
        ValueError: shapes differ, no images, or a target or unedited image that is not finite.
    """
    for name, x in (("edited", edited), ("target", target), ("unedited", unedited)):
        expect(isinstance(x, Tensor) and x.is_floating_point(), name, "a floating tensor", type(x).__name__)
    for name, x in (("target", target), ("unedited", unedited)):
        expect(x.shape == edited.shape, name, f"shape {tuple(edited.shape)}, that of edited", tuple(x.shape))
        expect(bool(x.isfinite().all()), name, "finite values", "NaN or inf")
    expect(edited.dim() >= 2 and len(edited) > 0, "edited", "at least one image (N, C, *spatial)", tuple(edited.shape))
    after, before = rmse(edited, target), rmse(unedited, target)
    bad = count_not_finite(edited)
    return EditScore(*mean_and_error(after), *mean_and_error(before - after), len(edited), bad)
