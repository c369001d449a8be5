"""Finds directions of attributes: differences of mean latents of training images with and without each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import Images
from pyglow_fast.latents import MeanLatent, to_space
from pyglow_fast.models import Glow
from pyglow_fast.studio.groups import Group, drawn_images
from pyglow_fast.studio.kept import progress_of
from pyglow_fast.studio.reading import inputs, read

REST = "rest"  # as minus: the images without the attribute, also where a class has this name


class Add(NamedTuple):
    """A change of an image: ``strength`` times the way from the images of ``minus`` to those of ``plus``.

    Examples:
        >>> from pyglow_fast.studio import Add, Edit
        >>> smile = Add("Smiling", "rest", 1.5)  # beyond the faces with a smile, from those without
        >>> Edit((smile, Add("Young", "rest", 0.0))).active
        (Add(plus='Smiling', minus='rest', strength=1.5),)
    """

    plus: str
    minus: str
    strength: float


class Directions(NamedTuple):
    """The mean latents and mean pixels of the training images with each attribute, and of those without.

    Args:
        space: which latents these are, "noise" or "latent".
        names: the names of the A attributes.
        counts: int64 (A, 2), how many images have each attribute and how many do not.
        means: float32, a tensor (A, 2, C, *spatial) for each level: the mean latents with and without.
        pixels: float32 (A, 2, C, *spatial), the mean x with and without.

    Examples:
        >>> import torch
        >>> from pyglow_fast.studio import Add, Directions
        >>> means = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]).reshape(1, 2, 2, 1, 1)  # with it, without
        >>> directions = Directions("latent", ("Smiling",), torch.tensor([[30, 70]]), (means,), means / 10)
        >>> latents, pixels = directions.shift([Add("Smiling", "rest", 1.5)])
        >>> latents[0].flatten(), pixels.flatten()
        (tensor([1.5000, 3.0000]), tensor([0.1500, 0.3000]))
    """

    space: str
    names: tuple[str, ...]
    counts: Tensor
    means: tuple[Tensor, ...]
    pixels: Tensor

    def shift(self, adds: Sequence[Add]) -> tuple[list[Tensor] | None, Tensor | None]:
        """Compute sum_j s_j (mean_plus_j - mean_minus_j), of the latents and of the pixels; None for no sum.

        Returns:
            A tensor (C, *spatial) for each level, and one of the image's shape; float32.

        Raises:
            ValueError: an attribute that there is not, a strength that is not finite, or one that makes the sum so.
        """
        every = [(*self._sides(add), add.strength) for add in adds]
        sides = [side for side in every if side[2] != 0.0]
        if not sides:
            return None, None
        sums = [
            torch.stack([s * (mean[plus] - mean[minus]) for plus, minus, s in sides]).sum(0)
            for mean in (*self.means, self.pixels)
        ]
        finite = all(bool(part.isfinite().all()) for part in sums)
        expect(finite, "strength", "numbers whose edit float32 can hold", [add.strength for add in adds])
        return sums[:-1], sums[-1]

    def _sides(self, add: Add) -> tuple[tuple[int, int], tuple[int, int]]:
        """Finds the means of both ends: each as (attribute, 0 with it or 1 without)."""
        known = ", ".join(self.names)
        one = f"one of {known}" if known else "no attribute, since the run's images have no classes"
        expect(add.plus in self.names, "plus", one, repr(add.plus))
        expect(add.minus in (*self.names, REST), "minus", f"{REST} or one of {known}", repr(add.minus))
        other = add.minus == REST or add.plus != add.minus
        expect(other, "minus", "another attribute than plus", repr(add.minus))
        expect(abs(add.strength) < float("inf"), "strength", "a finite number", add.strength)
        plus = self.names.index(add.plus)
        return (plus, 0), ((plus, 1) if add.minus == REST else (self.names.index(add.minus), 0))


@torch.no_grad()
def measure(
    model: Glow,
    data: Images,
    groups: list[Group],
    space: str,
    on_unreadable: str = "raise",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Compute the tensors of :class:`Directions` by name, and its names as bytes of JSON, in one pass over the images.

    Raises:
        ValueError: an image that cannot be read, or a group of which none can.
    """
    names = {"names": torch.tensor(list(json.dumps([group.name for group in groups]).encode()), dtype=torch.uint8)}
    if not groups:
        return names | {"pixels": torch.zeros(0), "counts": torch.zeros(0, 2, dtype=torch.int64)}
    drawn = drawn_images(groups)
    shared = drawn_images([group for group in groups if group.others is None])
    advance = progress_of(len(drawn), progress)
    everything, sides = MeanLatent(), [(MeanLatent(), MeanLatent()) for _ in groups]
    for batch in read(data, drawn, on_unreadable):
        x, y = inputs(batch.pixels, batch.labels, data.n_bins, model)
        values = [*to_space(model, x, space, y), x]
        everything.add(_chosen(values, torch.isin(batch.indices, shared)))
        for group, (with_it, without) in zip(groups, sides, strict=True):
            with_it.add(_chosen(values, torch.isin(batch.indices, group.images)))
            if group.others is not None:
                without.add(_chosen(values, torch.isin(batch.indices, group.others)))
        advance(len(batch.pixels))
    means = []
    counts = []
    for group, (with_it, without) in zip(groups, sides, strict=True):
        other = everything.without(with_it) if group.others is None else without
        counts.append((with_it.count, other.count))
        means.append([torch.stack([a, b]).float().cpu() for a, b in zip(with_it.mean(), other.mean(), strict=True)])
    *levels, pixels = (torch.stack(parts) for parts in zip(*means, strict=True))
    found = {f"level{i}": level for i, level in enumerate(levels)}
    return names | found | {"pixels": pixels, "counts": torch.tensor(counts)}


def _chosen(values: list[Tensor], mask: Tensor) -> list[Tensor]:
    return [value[mask.to(value.device)] for value in values]


def from_tensors(tensors: dict[str, Tensor], space: str) -> Directions:
    """Make the directions from tensors that :func:`measure` gave, now or when they were kept."""
    names = json.loads(bytes(tensors["names"].tolist()))
    levels = sorted((name for name in tensors if name.startswith("level")), key=lambda name: int(name[5:]))
    return Directions(
        space, tuple(names), tensors["counts"], tuple(tensors[name] for name in levels), tensors["pixels"]
    )
