"""Edits along a direction in the latents, and towards the means of the priors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast.latents.spaces import DEFAULT_SPACE, check_finite, check_shares, check_space, from_space
from pyglow_fast.models import Glow
from pyglow_fast.models.prior import check_labels
from pyglow_fast.nets.precision import overridden


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
        shift: one tensor (C, *spatial) a level, such as a strength times the mean latents of images with an attribute
            minus those of images without; None: 0.
        keep: one number in 0..1 a level, the share of the image's own latents that is kept; None: 1.
        space, y, cond: as of :func:`to_space`; y chooses the prior of the top level.

    Returns:
        (N, C, *spatial), with NaN or inf where an edit leads out of the model's range.

    Reference: Kingma & Dhariwal 2018, section 5.2.

    Examples:
        >>> import torch
        >>> from pyglow_fast import Glow
        >>> from pyglow_fast.latents import edited, to_space
        >>> model, x = Glow(image_shape=(1, 8, 8), n_levels=2, n_steps=1, hidden=4), torch.rand(6, 1, 8, 8) - 0.5
        >>> model.initialize(x)
        >>> latents = to_space(model, x)
        >>> smile = [z[:3].mean(0) - z[3:].mean(0) for z in latents]
        >>> edited(model, [z[:2] for z in latents], smile, keep=(0.5, 1.0)).shape
        torch.Size([2, 1, 8, 8])
    """
    check_space(space)
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    check_finite("latents", latents)
    model._check_latents(list(latents))
    check_labels(y, len(latents[0]), model.config.n_classes)
    shares = [1.0] * len(latents) if keep is None else check_shares("keep", keep)
    expect(len(shares) == len(latents), "keep", f"{len(latents)} numbers, one a level", len(shares))
    if shift is not None:
        check_finite("shift", shift, model.latent_shapes)
        shift = [part.to(z) for part, z in zip(shift, latents, strict=True)]
        check_finite("shift", shift)  # a narrower dtype may not hold what a wider one does

    def moved(level: int, z: Tensor) -> Tensor:
        return z if shift is None else z + shift[level]

    if space == "noise":
        kept = [moved(level, share * z) for level, (z, share) in enumerate(zip(latents, shares, strict=True))]
        return from_space(model, kept, space, y, cond)

    def choose(level: int, prior: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        z, share = latents[level], shares[level]
        if share < 1.0:
            mean, _ = prior()
            z = mean + share * (z - mean)
        return moved(level, z)

    with overridden("fp32"):  # from the deepest level up: each prior sees what the deeper levels are now
        return model._decode(latents, y, model._check_cond(cond, len(latents[-1])), choose)[0]
