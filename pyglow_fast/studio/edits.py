"""Edits one image: moves its latents along directions of attributes and towards the means of the priors."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.latents import edited, to_space
from pyglow_fast.studio.directions import Add, Directions, Progress
from pyglow_fast.studio.opened import TRAIN_IMAGES, OpenRun, Picked
from pyglow_fast.studio.pictures import Made, command_line, made_png
from pyglow_fast.studio.reading import BATCH
from pyglow_fast.studio.words import File, number_text
from pyglow_fast.train import to_pixels
from pyglow_fast.train.figures import image_picture

DIGITS = 6  # behind the point of a strength or a share: finer than any slider
STRONGEST = 3.0  # that an attribute is offered, where training images go further
SHORTER = 0.8  # of an end whose image is not finite, until one is
NEGLIGIBLE = 0.02


class Edited(NamedTuple):
    """An image after an edit."""

    pixels: Tensor  # int64 (C, H, W), grey levels 0..n_bins-1
    finite: bool  # whether all values that the model decoded are numbers; those that are not are shown grey
    beyond: tuple[str, ...]  # what was added so far that no training image lies there
    shifted: Tensor | None  # the twin, x + sum_j s_j (mean x with - without) as grey levels, if it was asked for


@dataclass(frozen=True)
class Edit:
    """A description of what is done to an image: attributes that are added, and what each level of latents keeps.

    Strengths and shares are rounded to DIGITS behind the point: a slider's 0.30000000000000004 is 0.3.
    """

    adds: tuple[Add, ...] = ()
    keep: tuple[float, ...] = ()  # the share of the image's own latents a level, shallowest first; empty: all

    def __post_init__(self) -> None:
        adds = tuple(add._replace(strength=round(add.strength, DIGITS)) for add in self.adds)
        object.__setattr__(self, "adds", adds)
        object.__setattr__(self, "keep", tuple(round(share, DIGITS) for share in self.keep))

    @property
    def active(self) -> tuple[Add, ...]:
        """The attributes whose strength is not 0."""
        return tuple(add for add in self.adds if add.strength != 0.0)

    @property
    def is_none(self) -> bool:
        """Whether nothing is changed."""
        return not self.active and all(share == 1.0 for share in self.keep)

    def options(self, pixel_shift: bool = False) -> list[str]:
        """The options of the command ``edit`` that describe this; a shift of the pixels keeps nothing of latents."""
        words = []
        for add in self.active:
            words += ["--add", add.plus, add.minus, number_text(add.strength)]
        if any(share != 1.0 for share in self.keep) and not pixel_shift:
            words += ["--keep", *map(number_text, self.keep)]
        return words


class Subject:
    """An image whose latents, in the space "noise" or "latent", were taken once: to be edited, or the end of a path.

    Raises:
        ValueError: the image does not fit the model; its latents are not finite.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.studio import Edit, OpenRun, Subject, parse_image
        >>> from pyglow_fast.train import TrainConfig, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> result = start(TrainConfig(model=model, max_steps=1), "runs/tiny").execute(quiet=True)
        >>> opened = OpenRun.open("runs/tiny")
        >>> subject = Subject(opened, opened.pick(parse_image("0")), "noise")  # held-out image 0
        >>> half = Edit(keep=(0.5,))
        >>> made = subject.made(subject.edited(half).pixels, half)
        >>> made.command, made.data[:4]
        ('pyglow-fast edit runs/tiny 0 --keep 0.5 --space noise', b'\x89PNG')
    """

    @torch.no_grad()
    def __init__(self, opened: OpenRun, picked: Picked, space: str) -> None:
        self.opened, self.picked, self.space = opened, picked, space
        self.pixels = picked.pixels.long()
        self._x, self.y = opened.x(self.pixels[None]), opened.y(picked.label)
        self.latents = to_space(opened.model, self._x, space, self.y)
        finite = all(bool(latent.isfinite().all()) for latent in self.latents)
        expect(finite, "image", "one whose latents are finite", f"NaN or inf in those of {picked.image.text}")

    @property
    def from_file(self) -> bool:
        """Whether the image came out of a file."""
        return isinstance(self.picked.image, File)

    @functools.cached_property
    def bits(self) -> float:
        """The bits/dim of the image."""
        return self.bits_of(self.pixels)

    @functools.cached_property
    @torch.no_grad()
    def ends(self) -> Tensor:
        """How strongly each attribute alone can be taken away and added, (2, names): 0 or less, and 0 or more.

        An end is where the image lies as far along as the furthest training image, or before it, where the model's
        image of that is not finite.
        """
        directions = self.opened.directions(self.space)
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
        x = edited(self.opened.model, latents, space=self.space, y=y)
        return x.isfinite().flatten(1).all(1).cpu()

    def bits_of(self, pixels: Tensor) -> float:
        """The bits/dim of an edit of the image, under the image's class."""
        return self.opened.bits(pixels, self.picked.label)

    @torch.no_grad()
    def edited(self, edit: Edit, pixel_shift: bool = False, progress: Progress | None = None) -> Edited:
        """Compute the image after an edit, and its twin if asked for; without an edit it is the image, bit for bit.

        Raises:
            ValueError: an attribute that there is not, shares that do not fit the model's levels.
        """
        shift = difference = None
        beyond: tuple[str, ...] = ()
        if edit.active:
            directions = self.opened.directions(self.space, progress)
            shift, difference = directions.shift(edit.active)
            if shift is not None:
                far = directions.beyond([z + part.to(z) for z, part in zip(self.latents, shift, strict=True)])
                beyond = tuple(add.plus for add in edit.active if add.plus in far)
        n_levels, x = len(self.latents), self._x
        expect(len(edit.keep) in (0, n_levels), "keep", f"{n_levels} shares, one a level", len(edit.keep))
        if not edit.is_none:
            x = edited(self.opened.model, self.latents, shift, edit.keep or None, self.space, self.y)
        twin = None
        if pixel_shift:
            moved = self._x if difference is None else self._x + difference.to(self._x)
            twin = to_pixels(moved, self.opened.n_bins)[0].cpu()
        pixels = self.pixels if edit.is_none else to_pixels(x, self.opened.n_bins)[0].cpu()
        return Edited(pixels, bool(x.isfinite().all()), beyond, twin)

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

    def command(self, edit: Edit, pixel_shift: bool, scale: int | None = None) -> str:
        """Write the command that gives the same picture, without ``--out``."""
        opened = self.opened
        words = [self.picked.image.text, *edit.options(pixel_shift), "--space", self.space]
        if self.picked.label is not None:
            words += ["--label", opened.classes[self.picked.label]]
        if opened.train_images != TRAIN_IMAGES and edit.active:
            words += ["--train-images", str(opened.train_images)]
        return command_line(opened, "edit", words + (["--pixel-shift"] if pixel_shift else []), scale)

    def made(self, pixels: Tensor, edit: Edit, pixel_shift: bool = False, scale: int | None = None) -> Made:
        """Encode what :meth:`edited` gave as a PNG, large enough to look at unless ``scale`` says otherwise."""
        picture = image_picture(pixels, self.opened.n_bins, scale)
        return made_png(picture, self.command(edit, pixel_shift, scale))


def likelihood_text(opened: OpenRun, bits: float, progress: Progress | None = None, wait: bool = True) -> str:
    """Say in words how likely an image is: its bits/dim, and its rank among training images.

    Where these were not scored yet they are scored now; with ``wait`` False their rank is left out.
    """
    if not math.isfinite(bits):
        return "no finite likelihood"
    scores = opened.scores_at_hand(progress, wait)
    beside = f", more than {scores.share_below(bits):.1%} of {len(scores.train)} training images" if scores else ""
    return f"{bits:.3f} bits/dim{beside}"
