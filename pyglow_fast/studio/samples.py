"""Draws samples of a model so that the same settings give the same images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import check_seed, expect
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.models import Glow
from pyglow_fast.train import class_columns, class_cycle, device_of, to_pixels
from pyglow_fast.train.figures import PICTURE_IMAGES, grid

BATCH = 64
N, TEMPERATURE = 64, 0.7


class Drawn(NamedTuple):
    """The samples as pixels (n, C, H, W), their labels (n,) or None, and how many were not finite (now grey).

    Examples:
        >>> from pyglow_fast import Glow, GlowConfig
        >>> from pyglow_fast.studio import Draw, Drawn
        >>> model = Glow(GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)).eval()
        >>> drawn = Draw(n=6).drawn(model, n_bins=17)
        >>> isinstance(drawn, Drawn), drawn.pixels.shape, drawn.labels, drawn.not_finite
        (True, torch.Size([6, 1, 8, 8]), None, 0)
    """

    pixels: Tensor
    labels: Tensor | None
    not_finite: int


@dataclass(frozen=True)
class Draw:
    """A description of samples to draw: how many, of which class, at which temperature, from which seed.

    Args:
        n: how many.
        temperature: multiplies the standard deviation of the priors; 0 is the mode.
        seed: the same seed draws the same images.
        labels: numbers of classes, in turn; empty: all classes in turn.

    Raises:
        ValueError: a value outside its range.

    Examples:
        >>> from pyglow_fast import Glow, GlowConfig
        >>> from pyglow_fast.studio import Draw
        >>> model = Glow(GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4, n_classes=3)).eval()
        >>> draw = Draw(n=6, temperature=0.7, seed=1)
        >>> draw.labels_of(model)
        tensor([0, 1, 2, 0, 1, 2])
        >>> draw.drawn(model, n_bins=17).pixels.equal(draw.drawn(model, n_bins=17).pixels)  # one seed, the same images
        True
    """

    n: int = N
    temperature: float = TEMPERATURE
    seed: int = 0
    labels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        PICTURE_IMAGES.check("n", self.n, whole=True)
        finite = 0.0 <= self.temperature < float("inf")
        expect(finite, "temperature", "a number, 0 or more", self.temperature)
        check_seed(self.seed)

    def check(self, model: Glow) -> None:
        """Refuse classes that the model does not have.

        Raises:
            ValueError: there are such.
        """
        for label in self.labels:
            check_label(label, model)

    def labels_of(self, model: Glow) -> Tensor | None:
        """Compute the label of each sample, (n,), or None for a model without classes."""
        device = device_of(model)
        if not self.labels:
            return class_cycle(self.n, model.config.n_classes, device)
        return torch.tensor(self.labels, device=device)[torch.arange(self.n, device=device) % len(self.labels)]

    def drawn(self, model: Glow, n_bins: int) -> Drawn:
        """Draw the samples from a model.

        Raises:
            ValueError: a class that the model does not have.
        """
        self.check(model)
        y = self.labels_of(model)
        generator, found = torch.Generator(device_of(model)).manual_seed(self.seed), []
        for first in range(0, self.n, BATCH):
            count = min(BATCH, self.n - first)
            part = None if y is None else y[first : first + count]
            found.append(model.sample(count, self.temperature, y=part, generator=generator))
        x = torch.cat(found)
        return Drawn(to_pixels(x, n_bins).cpu(), None if y is None else y.cpu(), count_not_finite(x))

    def picture(self, drawn: Drawn, model: Glow, n_bins: int, columns: int | None, scale: int | None) -> Tensor:
        """Place the samples side by side, uint8 (3, height, width): with all classes, each in a column of its own."""
        columns = columns or (None if self.labels else class_columns(self.n, model.config.n_classes))
        return grid(drawn.pixels, n_bins, columns, scale)


def check_label(label: int, model: Glow) -> None:
    """Refuse the number of a class that the model does not have.

    Raises:
        ValueError: it is such.
    """
    count = model.config.n_classes
    expect(count is not None, "label", "no label, since the model has no classes", label)
    assert count is not None  # for the type checker: refused above
    expect(0 <= label < count, "label", f"a class in 0..{count - 1}", label)
