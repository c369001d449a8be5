"""Edits one image: moves its latents along directions of attributes, towards the priors' means, or to another's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast.app.studio.directions import Add, Directions
from pyglow_fast.app.studio.opened import OpenRun, Picked
from pyglow_fast.app.studio.pictures import COMMAND, Made, command_line, made_png
from pyglow_fast.app.studio.reading import BATCH
from pyglow_fast.app.studio.words import number_text
from pyglow_fast.latents import decode_path, edited, to_space
from pyglow_fast.likelihood import not_finite
from pyglow_fast.train import to_pixels
from pyglow_fast.train.figures import animation_bytes, grid, image_picture

DIGITS = 6  # behind the point of a strength or a share: finer than any slider
STRONGEST = 3.0  # that an attribute is offered, where training images go further
SHORTER = 0.8  # of an end whose image is not finite, until one is
NEGLIGIBLE = 0.02
ANIMATED = (".gif", ".webp")  # the files of a path that move


class Edited(NamedTuple):
    """An image after an edit."""

    pixels: Tensor  # int64 (C, H, W), grey levels 0..n_bins-1
    finite: bool  # whether all values that the model decoded are numbers; those that are not are shown grey
    beyond: tuple[str, ...]  # what was added so far that no training image lies there


@dataclass(frozen=True)
class Edit:
    """A description of what is done to an image: attributes that are added, and what each level of latents keeps.

    Strengths and shares are rounded to DIGITS behind the point: a slider's 0.30000000000000004 is 0.3, and what is
    added with strength 0 is left out.
    """

    adds: tuple[Add, ...] = ()
    keep: tuple[float, ...] = ()  # the share of the image's own latents a level, shallowest first; empty: all

    def __post_init__(self) -> None:
        adds = (add._replace(strength=round(add.strength, DIGITS)) for add in self.adds)
        object.__setattr__(self, "adds", tuple(add for add in adds if add.strength != 0.0))
        object.__setattr__(self, "keep", tuple(round(share, DIGITS) for share in self.keep))

    @property
    def is_none(self) -> bool:
        """Whether nothing is changed."""
        return not self.adds and all(share == 1.0 for share in self.keep)


class Subject:
    """An image whose latents, in the run's space, were taken once: to be edited, or the end of a path.

    Raises:
        ValueError: the image does not fit the model; its latents are not finite.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.app.studio import Edit, OpenRun, Subject, parse_image
        >>> from pyglow_fast.train import TrainConfig, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> result = start(TrainConfig(model=model, max_steps=1), "runs/tiny").execute(quiet=True)
        >>> opened = OpenRun.open("runs/tiny")
        >>> subject = Subject(opened, opened.pick(parse_image("0")))  # held-out image 0
        >>> half = Edit(keep=(0.5,))
        >>> made = subject.made(subject.edited(half).pixels, half)
        >>> made.command, made.data[:4]
        ('pyglow-fast edit runs/tiny 0 --keep 0.5', b'\x89PNG')
    """

    @torch.no_grad()
    def __init__(self, opened: OpenRun, picked: Picked) -> None:
        self.opened, self.picked = opened, picked
        self.pixels = picked.pixels.long()
        self.y = opened.y(picked.label)
        self.latents = to_space(opened.model, opened.x(self.pixels[None]), opened.space, self.y)
        finite = all(bool(latent.isfinite().all()) for latent in self.latents)
        expect(finite, "image", "one whose latents are finite", f"NaN or inf in those of {picked.image.text}")

    @functools.cached_property
    def bits(self) -> float:
        """The bits/dim of the image."""
        return self.bits_of(self.pixels)

    @functools.cached_property
    @torch.no_grad()
    def ends(self) -> Tensor:
        """The strengths to which each attribute alone can be taken away and added, (2, names): up to 0, and from 0 on.

        An end is where the image lies as far along as the furthest training image, or before it, where the model's
        image of that is not finite.
        """
        directions = self.opened.directions()
        away, added = directions.reach.T - directions.places(self.latents)[:, 0]
        ends = torch.stack([away.clamp(-STRONGEST, 0), added.clamp(0, STRONGEST)])
        for side in ends:
            todo = torch.arange(len(side))
            while len(todo):
                bad = [chosen[~self._decodes(directions, chosen, side[chosen])] for chosen in todo.split(BATCH)]
                todo = torch.cat(bad)
                side[todo] *= SHORTER
                todo = todo[side[todo].abs() > NEGLIGIBLE]
        return ends.where(ends.abs() > NEGLIGIBLE, 0.0)

    def _decodes(self, directions: Directions, chosen: Tensor, strengths: Tensor) -> Tensor:
        """Tells for each of the chosen attributes whether this image with so much of it is finite."""
        latents = []
        for z, mean in zip(self.latents, directions.means, strict=True):
            way = mean[chosen, 0] - mean[chosen, 1]
            latents.append(z + (way * strengths.to(way).reshape(-1, *[1] * (way.dim() - 1))).to(z))
        y = None if self.y is None else self.y.expand(len(chosen))
        x = edited(self.opened.model, latents, space=self.opened.space, y=y)
        return x.isfinite().flatten(1).all(1).cpu()

    def bits_of(self, pixels: Tensor) -> float:
        """The bits/dim of an edit of the image, under the image's class."""
        return self.opened.bits(pixels, self.picked.label)

    @torch.no_grad()
    def edited(self, edit: Edit) -> Edited:
        """Compute the image after an edit; without one it is the image, bit for bit.

        Raises:
            ValueError: an attribute that there is not, shares that do not fit the model's levels.
        """
        n_levels = len(self.latents)
        expect(len(edit.keep) in (0, n_levels), "keep", f"{n_levels} shares, one a level", len(edit.keep))
        if edit.is_none:
            return Edited(self.pixels, True, ())
        opened, shift = self.opened, None
        beyond: tuple[str, ...] = ()
        if edit.adds:
            directions = opened.directions()
            shift = directions.shift(edit.adds)
            far = directions.beyond([z + part.to(z) for z, part in zip(self.latents, shift, strict=True)])
            beyond = tuple(add.plus for add in edit.adds if add.plus in far)
        x = edited(opened.model, self.latents, shift, edit.keep or None, opened.space, self.y)
        return Edited(to_pixels(x, opened.n_bins)[0].cpu(), bool(x.isfinite().all()), beyond)

    def outside(self, found: Edited, bits: float) -> str:
        """Say in one sentence that an edit, of so many bits/dim, leads far out of what the model has seen; else ""."""
        if not found.finite:
            return "Parts of the edit are not finite, shown grey: it leads out of the model's range."
        if found.beyond:
            return f"Far out: no training image that was measured goes so far along {', '.join(found.beyond)}."
        scores = self.opened.scores_at_hand(wait=False)
        if scores is None or bits <= float(torch.cat(scores).max()):
            return ""
        return f"Far out: it is less likely than each of {sum(map(len, scores))} images that were scored."

    def made(self, pixels: Tensor, edit: Edit, scale: int | None = None) -> Made:
        """Encode what :meth:`edited` gave as a PNG, large enough to look at unless ``scale`` says otherwise."""
        words = [self.picked.image.text]
        for add in edit.adds:
            words += ["--add", add.plus, add.minus, number_text(add.strength)]
        if any(share != 1.0 for share in edit.keep):
            words += ["--keep", *map(number_text, edit.keep)]
        if self.picked.label is not None:
            words += ["--label", self.opened.classes[self.picked.label]]
        return made_png(self.opened, "edit", words, image_picture(pixels, self.opened.n_bins, scale), scale)


class Between:
    """A path from one image to another of a run: straight in its space, or on great circles level by level."""

    def __init__(self, first: Subject, last: Subject, spherical: bool = False) -> None:
        self.first, self.last, self.spherical = first, last, spherical

    @torch.no_grad()
    def frames(self, times: Sequence[float]) -> tuple[Tensor, int]:
        """Compute the frames at points of the path between 0 and 1, (n, C, H, W), and how many were not finite."""
        first, last, opened = self.first, self.last, self.first.opened
        ends, labels = (first.latents, last.latents), (first.y, last.y)
        x = decode_path(opened.model, *ends, times, self.spherical, opened.space, labels)[0]
        return to_pixels(x, opened.n_bins).cpu(), len(not_finite(x))

    def made(self, pixels: Tensor, at: float | None = None, suffix: str = ".png", scale: int | None = None) -> Made:
        """Encode frames (n, C, H, W): the one ``at`` a point, or all, side by side (PNG) or there and back (GIF, WebP).

        All are evenly spaced.
        """
        opened = self.first.opened
        words = ["--from", self.first.picked.image.text, "--to", self.last.picked.image.text]
        words += ["--spherical"] if self.spherical else []
        words += ["--frames", str(len(pixels))] if at is None else ["--at", number_text(at)]
        if suffix in ANIMATED:
            command = command_line(opened, "interpolate", words, scale)
            data = animation_bytes(pixels, opened.n_bins, suffix[1:], scale, f"{COMMAND}: {command}")
            return Made(data, command, suffix)
        if at is None:
            picture = grid(pixels, opened.n_bins, len(pixels), scale)
        else:
            picture = image_picture(pixels[0], opened.n_bins, scale)
        return made_png(opened, "interpolate", words, picture, scale)


def likelihood_text(opened: OpenRun, bits: float, wait: bool = True) -> str:
    """Say in words how likely an image is: its bits/dim, and its rank among held-out images.

    Where these were not scored yet they are scored now; with ``wait`` False their rank is left out.
    """
    if not math.isfinite(bits):
        return "no finite likelihood"
    scores = opened.scores_at_hand(wait)
    beside = f", more than {scores.share_below(bits):.1%} of {len(scores.held_out)} held-out images" if scores else ""
    return f"{bits:.3f} bits/dim{beside}"
