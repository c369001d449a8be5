"""Finds directions of what images can have: differences of mean latents of training images with and without it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._core.errors import did_you_mean, expect
from pyglow_fast.app.studio.reading import BATCH, inputs
from pyglow_fast.data import Images
from pyglow_fast.latents import to_space
from pyglow_fast.models import Glow
from pyglow_fast.train import progress_line

REST = "rest"  # as minus: the images without, also where a class has this name
HEADINGS = {"skin tone ": "skin tone", "on ": "background"}  # of attributes whose names begin so
SPAN = 500  # training images, at least, that say how far images lie along each direction


class Add(NamedTuple):
    """A change of an image: ``strength`` times the way from the images of ``minus`` to those of ``plus``."""

    plus: str
    minus: str
    strength: float


class Directions(NamedTuple):
    """The mean latents of the training images of each class or attribute, and of those without."""

    names: tuple[str, ...]  # of the classes, and behind them those of the attributes
    n_classes: int
    means: tuple[Tensor, ...]  # float32 (names, 2, C, *spatial) for each level: with it, without
    reach: Tensor  # float64 (names, 2), the least and the greatest of places() that training images have

    def listed(self) -> list[tuple[str, str, str]]:
        """List (heading, name, label) for people: the attributes by what their names begin with, then the classes."""
        found = [("class", name, f"more like {name}") for name in self.names[: self.n_classes]]
        for name in self.names[self.n_classes :]:
            start = next((each for each in HEADINGS if name.startswith(each)), "")
            found.append((HEADINGS.get(start, "attributes"), name, name.removeprefix(start)))
        order = ("attributes", *HEADINGS.values(), "class")
        return sorted(found, key=lambda each: order.index(each[0]))

    def shift(self, adds: Sequence[Add]) -> list[Tensor]:
        """Compute sum_j s_j (mean_plus_j - mean_minus_j) of each level, for one addition at least.

        A name that there is not, or a strength that is not finite or makes the sum so, is refused.
        """
        sides = [(*self._sides(add), add.strength) for add in adds]
        sums = [torch.stack([s * (mean[plus] - mean[minus]) for plus, minus, s in sides]).sum(0) for mean in self.means]
        finite = all(bool(part.isfinite().all()) for part in sums)
        expect(finite, "strength", "numbers whose edit float32 can hold", [add.strength for add in adds])
        return sums

    def places(self, latents: Sequence[Tensor]) -> Tensor:
        """Compute where latents of n images lie along each direction, (names, n): means without at 0, with at 1."""
        with_it, without = (torch.cat([mean[:, i].double().flatten(1) for mean in self.means], 1) for i in (0, 1))
        z, way = torch.cat([latent.double().flatten(1).cpu() for latent in latents], 1), with_it - without
        along = way @ z.T - (way * without).sum(1, keepdim=True)
        return along / way.square().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)

    def beyond(self, latents: Sequence[Tensor]) -> list[str]:
        """List the names along whose directions latents of one image lie further than any training image's."""
        low, high = self.reach.unbind(1)
        place = self.places(latents)[:, 0]
        return [name for name, far in zip(self.names, ((place < low) | (place > high)).tolist(), strict=True) if far]

    def _sides(self, add: Add) -> tuple[tuple[int, int], tuple[int, int]]:
        """The places of the means of both ends: each (name, 0 with it or 1 without)."""
        known = ", ".join(self.names)
        one = f"one of {known}" if known else "no attribute, since the run's images have none"
        expect(add.plus in self.names, "plus", one, repr(add.plus) + did_you_mean(add.plus, self.names))
        expect(add.minus in (*self.names, REST), "minus", f"{REST} or one of {known}", repr(add.minus))
        expect(add.minus == REST or add.plus != add.minus, "minus", "another one than plus", repr(add.minus))
        expect(abs(add.strength) < math.inf, "strength", "a finite number", add.strength)
        plus = self.names.index(add.plus)
        return (plus, 0), ((plus, 1) if add.minus == REST else (self.names.index(add.minus), 0))


def compared(data: Images, chosen: Tensor) -> tuple[list[str], int, Tensor]:
    """List (names, how many are classes, float64 (2, names, n): each chosen image's weight in both means of each).

    A class is compared with all other images. An attribute is compared with images that differ in it alone where there
    are groups that hold such, as emoji in several skin tones; else within each class, where one holds both; so that
    what else images show makes little difference.
    """
    labels = data.labels[chosen] if data.labels is not None and len(data.class_names) > 1 else None
    everyone = torch.zeros_like(chosen)
    asked = [] if labels is None else [(name, labels == k, [everyone]) for k, name in enumerate(data.class_names)]
    classes = [name for name, _, _ in asked]
    if data.attributes is not None:
        has = data.attributes.has[chosen]
        number = {name: i for i, name in enumerate(dict.fromkeys(data.groups))}
        group = torch.tensor([number[data.groups[i]] for i in chosen.tolist()]) if number else None
        for i, name in enumerate(data.attributes.names):
            cells = [everyone] if labels is None else [labels, everyone]
            if group is not None:
                others = torch.cat([has[:, :i], has[:, i + 1 :], group[:, None]], 1)
                cells.insert(0, others.unique(dim=0, return_inverse=True)[1])
            if name not in classes:
                asked.append((name, has[:, i], cells))
    names, weights = [], []
    for name, having, cells in asked:
        found = next((each for each in (_matched(having, cell) for cell in cells) if each.any()), None)
        if found is not None:
            names.append(name)
            weights.append(found / found.sum(1, keepdim=True))
    empty = torch.zeros(2, 0, len(chosen), dtype=torch.float64)
    return names, sum(name in classes for name in names), torch.stack(weights, 1) if weights else empty


def _matched(has: Tensor, cells: Tensor) -> Tensor:
    """Weights (2, n) of images with and without, by which each cell that has both counts once."""
    sides = torch.stack([has, ~has]).double()
    counts = torch.zeros(2, int(cells.max()) + 1, dtype=torch.float64).index_add_(1, cells, sides)
    return sides * (counts > 0).all(0)[cells] / counts.clamp(min=1)[:, cells]


@torch.no_grad()
def measure(model: Glow, data: Images, chosen: Tensor, space: str) -> dict[str, Tensor]:
    """Compute the tensors of :class:`Directions` by name, and its names as bytes of JSON, over ``chosen`` images."""
    chosen = data.without_skipped(chosen)
    names, n_classes, weights = compared(data, chosen)
    facts = json.dumps({"names": names, "classes": n_classes}).encode()
    sums: list[Tensor] = []
    seen: list[list[Tensor]] = []
    done, step = 0, max(1, len(chosen) // SPAN)
    asked = chosen if names else chosen[:1]
    with progress_line("mean latents", len(asked)) as line:
        for part in asked.split(BATCH):
            x, y = inputs(*data.batch(part), data.n_bins, model)
            values = to_space(model, x, space, y)
            own = weights[:, :, done : done + len(x)].to(x.device)
            found = [torch.tensordot(own, value.double(), 1) for value in values]
            sums = [old + new for old, new in zip(sums, found, strict=True)] if sums else found
            seen.append([value[-done % step :: step].cpu() for value in values])
            done += len(x)
            line.update(len(x))
    finite = all(bool(each.isfinite().all()) for each in sums)
    expect(finite, "data", "training images whose latents are finite", "NaN or inf in those of some")
    tensors = {f"level{i}": each.transpose(0, 1).float().contiguous().cpu() for i, each in enumerate(sums)}
    tensors["facts"] = torch.tensor(list(facts), dtype=torch.uint8)
    places = from_tensors(tensors).places([torch.cat(parts) for parts in zip(*seen, strict=True)])
    return tensors | {"reach": torch.stack([places.amin(1), places.amax(1)], 1)}


def from_tensors(tensors: dict[str, Tensor]) -> Directions:
    """Make the directions from tensors that :func:`measure` gave, now or when they were kept."""
    facts = json.loads(bytes(tensors["facts"].tolist()))
    levels = tuple(tensors[f"level{i}"] for i in range(sum(name.startswith("level") for name in tensors)))
    names = tuple(facts["names"])
    reach = tensors.get("reach", torch.tensor([[-math.inf, math.inf]] * len(names)))
    return Directions(names, facts["classes"], levels, reach)
