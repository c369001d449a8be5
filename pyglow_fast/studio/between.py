"""Makes the path from one image to another: frames, a strip of them, an animation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.latents import decode_path
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.studio.commands import COMMAND, Made, command_line, made_png, taken_names
from pyglow_fast.studio.edits import Subject
from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.words import name_word, number_text
from pyglow_fast.train import to_pixels
from pyglow_fast.train.figures import animation_bytes, grid, image_picture

ANIMATED = (".gif", ".webp")


@dataclass(frozen=True)
class Between:
    """A path from one image to another through the latents.

    Args:
        opened: the run.
        first, last: the images.
        space: "noise" or "latent".
        spherical: whether the path follows great circles, level by level.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.studio import Between, OpenRun, parse_image
        >>> from pyglow_fast.train import TrainConfig, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> result = start(TrainConfig(model=model, max_steps=1), "runs/tiny").execute(quiet=True)
        >>> opened = OpenRun.open("runs/tiny")
        >>> between = Between(opened, opened.pick(parse_image("0")), opened.pick(parse_image("1")), "noise")
        >>> frames, not_finite = between.frames(5)
        >>> frames.shape, between.made(frames, ".gif").data[:3]
        (torch.Size([5, 1, 8, 8]), b'GIF')
    """

    opened: OpenRun
    first: Picked
    last: Picked
    space: str
    spherical: bool = False

    @classmethod
    def of(cls, first: Subject, last: Subject, spherical: bool = False) -> Between:
        """Make the path between two images of one run whose latents were taken before, in the same space."""
        path = cls(first.opened, first.picked, last.picked, first.space, spherical)
        path.__dict__["_ends"] = (first, last)  # what the property would take anew
        return path

    @functools.cached_property
    def _ends(self) -> tuple[Subject, Subject]:
        """Both images with their latents."""
        return Subject(self.opened, self.first, self.space), Subject(self.opened, self.last, self.space)

    @torch.no_grad()
    def frames(self, count: int = 8, times: tuple[float, ...] | None = None) -> tuple[Tensor, int]:
        """Compute the frames, grey levels int64 (count, C, H, W), both ends included, and how many were not finite.

        Args:
            count: how many, evenly spaced.
            times: the points of the path between 0 and 1 that are computed instead.

        Raises:
            ValueError: fewer than two, or points outside of 0..1; an end that does not fit the model, or whose latents
                are not finite.
        """
        first, last = self._ends
        latents, labels = (first.latents, last.latents), (first.y, last.y)
        x = decode_path(self.opened.model, *latents, count, self.spherical, self.space, labels, times=times)[0]
        return to_pixels(x, self.opened.n_bins).cpu(), count_not_finite(x)

    def _words(self) -> list[str]:
        words = ["--from", self.first.image.text, "--to", self.last.image.text, "--space", self.space]
        if self.first.label is not None and self.last.label is not None:
            classes = self.opened.classes
            words += ["--labels", *(name_word(classes[label]) for label in (self.first.label, self.last.label))]
        return words + (["--spherical"] if self.spherical else [])

    def made_frame(self, pixels: Tensor, time: float, scale: int = 1) -> Made:
        """Encode one frame (C, H, W) as a PNG."""
        words = [*self._words(), "--at", number_text(time), "--scale", str(scale)]
        picture = image_picture(pixels, self.opened.n_bins, scale)
        return made_png(picture, command_line(self.opened, "interpolate", words), self._taken)

    def made(self, pixels: Tensor, suffix: str, scale: int | None = None) -> Made:
        """Encode all frames (n, C, H, W): side by side as a PNG, or there and back again as a GIF or WebP.

        Raises:
            ValueError: another suffix.
        """
        words = [*self._words(), "--frames", str(len(pixels))]
        command = command_line(self.opened, "interpolate", words + (["--scale", str(scale)] if scale else []))
        if suffix == ".png":
            return made_png(grid(pixels, self.opened.n_bins, len(pixels), scale), command, self._taken)
        expect(suffix in ANIMATED, "out", f"a name ending in {' or '.join(('.png', *ANIMATED))}", repr(suffix))
        data = animation_bytes(pixels, self.opened.n_bins, suffix[1:], scale=scale, text={COMMAND: command})
        return Made(data, command, suffix, taken=self._taken)

    @property
    def _taken(self) -> frozenset[str]:
        return taken_names(self.opened, (self.first, self.last))
