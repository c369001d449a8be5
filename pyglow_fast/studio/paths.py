"""Makes paths from one image of a run to another, as pictures that hold the command that repeats them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast.latents import decode_path
from pyglow_fast.likelihood import not_finite
from pyglow_fast.studio.edits import Subject
from pyglow_fast.studio.pictures import COMMAND, Made, command_line, made_png
from pyglow_fast.studio.words import number_text
from pyglow_fast.train import to_pixels
from pyglow_fast.train.figures import animation_bytes, grid, image_picture

ANIMATED = (".gif", ".webp")


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
