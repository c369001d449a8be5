"""Edits as the latents API gives them, computed beside the product's own way; and commands run again from pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pyglow_fast.app.cli import main
from pyglow_fast.data import Images, load_data, split
from pyglow_fast.latents import edited, to_space
from pyglow_fast.likelihood import dequantize
from pyglow_fast.models import Glow
from pyglow_fast.train import RunFolder, load_model, to_pixels


def rgb_of(path: Path) -> np.ndarray[Any, Any]:
    """Read the pixels of a picture, (H, W, 3)."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def assert_repeatable(path: Path, option: str = "--out") -> list[str]:
    """The command that a PNG holds gives the same bytes; returns its words."""
    with Image.open(path) as picture:
        picture.load()
        program, *words = shlex.split(picture.text["Command"])  # type: ignore[attr-defined]
    assert program == "pyglow-fast"
    again = path.with_name("again.png")
    assert main([*words, option, str(again)]) == 0
    assert again.read_bytes() == path.read_bytes()
    again.unlink()
    return words


class ByHand:
    """A run, and what edits of its images give by the definitions alone."""

    def __init__(self, run: Path) -> None:
        checkpoint = RunFolder(run).load()
        self.config = checkpoint.config
        self.model: Glow = load_model(checkpoint, run.name)
        self.data: Images = load_data(self.config.data)
        self.train, self.held_out = split(self.data, self.config.data.held_out, self.config.seed)
        self.n_bins = self.data.n_bins

    def x(self, pixels: Tensor) -> Tensor:
        """Turn pixels (N, C, H, W) into the model's input."""
        return dequantize(pixels, self.n_bins, noise=torch.full(pixels.shape, 0.5))

    def y(self, labels: Tensor | None) -> Tensor | None:
        """Labels for a model that takes some."""
        return None if self.model.config.n_classes is None else labels

    def chosen(self, name: str) -> tuple[Tensor, Tensor]:
        """Indices of the training images with an attribute, and of those without."""
        if name.startswith("skin tone "):
            assert self.data.attributes is not None
            names, has = self.data.attributes
            toned = [i for i in self.train.tolist() if has[i, names.index(name)]]
            emoji = {self.data.groups[i] for i in toned}
            plain = [i for i in self.train.tolist() if self.data.groups[i] in emoji and not has[i].any()]
            return torch.tensor(toned), torch.tensor(plain)
        assert self.data.labels is not None
        has = self.data.labels[self.train] == self.data.class_names.index(name)
        return self.train[has], self.train[~has]

    def direction(self, plus: str, minus: str, space: str) -> list[Tensor]:
        """The difference of both means a level."""
        with_it = self.chosen(plus)[0]
        without = self.chosen(plus)[1] if minus == "rest" else self.chosen(minus)[0]
        order, parts = self.train.sort().values, []
        for part in order.split(64):  # one image's latents may depend on its batch by roundings
            pixels, labels = self.data.batch(part)
            parts.append(to_space(self.model, self.x(pixels), space, self.y(labels)))
        latents = [torch.cat(level).double() for level in zip(*parts, strict=True)]
        means = [[z[torch.isin(order, side)].mean(0).float() for z in latents] for side in (with_it, without)]
        return [a - b for a, b in zip(*means, strict=True)]

    @torch.no_grad()
    def edited(
        self,
        pixels: Tensor,
        label: int | None,
        adds: Sequence[tuple[str, str, float]] = (),
        keep: Sequence[float] | None = None,
    ) -> Tensor:
        """Levels (C, H, W) of the image (C, H, W) after an edit: of latents for a model with classes, else of noise."""
        x, y = self.x(pixels[None]), self.y(None if label is None else torch.tensor([label]))
        space = "noise" if self.model.config.n_classes is None else "latent"
        shifts = [[s * part for part in self.direction(plus, minus, space)] for plus, minus, s in adds]
        shift = [torch.stack(parts).sum(0) for parts in zip(*shifts, strict=True)] if shifts else None
        found = edited(self.model, to_space(self.model, x, space, y), shift, keep, space, y)
        return to_pixels(found, self.n_bins)[0]

    def held(self, number: int) -> tuple[Tensor, int | None]:
        """Levels and label of a held-out image."""
        pixels, labels = self.data.batch(self.held_out[number : number + 1])
        return pixels[0], None if labels is None or self.model.config.n_classes is None else int(labels[0])
