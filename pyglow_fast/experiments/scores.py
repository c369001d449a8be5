"""Scores single images by bits/dim, and writes them as a CSV file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import visible
from pyglow_fast.data import Images, LazyImages
from pyglow_fast.data.lazy import FileReader
from pyglow_fast.train import ImageScores
from pyglow_fast.train.csv_text import Cell, csv_text
from pyglow_fast.train.files import write_text

NAMED = 5  # images that are named in a line about many


@dataclass(frozen=True)
class ScoredImages:
    """Images of a set, and the bits/dim that a model gives each of them.

    Args:
        images: the images, of which all or some were scored.
        scores: their scores, whose indices are those in ``images``.
        positions: int64 (len(images),), the index of each image in the set that the images come from; None: the same as
            here.

    Examples:
        >>> import torch
        >>> from pyglow_fast.data import load_digits
        >>> from pyglow_fast.experiments import ScoredImages, score_csv
        >>> from pyglow_fast.train import ImageScores
        >>> few = load_digits().subset([5, 7])
        >>> scores = ImageScores(torch.arange(2), torch.tensor([[2.5], [float("inf")]]))
        >>> print(score_csv({"digits": ScoredImages(few, scores, positions=torch.tensor([5, 7]))}), end="")
        index,label,bits_per_dim
        5,5,2.5
        7,7,inf
    """

    images: Images
    scores: ImageScores
    positions: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """Which of the scores are finite numbers, bool (n,)."""
        return self.scores.bits_per_dim.isfinite()

    def position(self, index: int) -> int:
        """The place of image ``index`` in the set that it comes from."""
        return index if self.positions is None else int(self.positions[index])

    def name(self, index: int) -> str:
        """The file of image ``index`` where images are read when needed, else the key of its group, or ""."""
        images = self.images
        if isinstance(images, LazyImages) and isinstance(images.pixels.dataset, FileReader):
            return images.pixels.dataset.names[images.pixels.position(index)]
        return images.groups[index] if images.groups else ""

    def label(self, index: int) -> str:
        """The name of image ``index``'s class, or "" without labels."""
        labels = self.images.labels
        return "" if labels is None else self.images.class_names[int(labels[index])]

    def listing(self, indices: list[int]) -> str:
        """Name images in words: the first few by position and name, and how many more."""
        names = [(i, visible(self.name(i))) for i in indices[:NAMED]]
        shown = ", ".join(f"{self.position(i)}{f' ({name})' if name else ''}" for i, name in names)
        return shown + (f" and {len(indices) - NAMED} more" if len(indices) > NAMED else "")

    def complaints(self) -> list[str]:
        """Write lines about images without a finite score, and about those that could not be read."""
        found = {
            "without a finite likelihood, left out of the figures": self.scores.indices[~self.finite].tolist(),
            "that cannot be read": list(self.scores.unreadable),
        }
        return [
            f"{len(indices)} image{'s' if len(indices) > 1 else ''} {what}: {self.listing(indices)}"
            for what, indices in found.items()
            if indices
        ]


def score_csv(sets: Mapping[str, ScoredImages]) -> str:
    """Write a line for each image as CSV text: set, index, name, label, bits_per_dim, bits_per_dim_sd.

    The columns ``set``, ``name``, ``label`` and ``bits_per_dim_sd`` (over the draws) are left out unless there are
    several sets, images with names, images with classes, and more than one draw. Scores that are not finite are ``nan``
    and ``inf``.

    Texts are written as by :func:`pyglow_fast.train.csv_text.csv_text`: no spreadsheet takes one for a formula.

    Args:
        sets: the scored images, by the name that each set has in the column ``set``.
    """
    rows = [(name, found, at, i) for name, found in sets.items() for at, i in enumerate(found.scores.indices.tolist())]
    draws = max((found.scores.draws.shape[1] for found in sets.values()), default=1)
    columns: dict[str, Sequence[Cell]] = {"set": [name for name, *_ in rows]} if len(sets) > 1 else {}
    columns["index"] = [found.position(i) for _, found, _, i in rows]
    named = {
        "name": [found.name(i) for _, found, _, i in rows],
        "label": [found.label(i) for _, found, _, i in rows],
    }
    columns |= {title: values for title, values in named.items() if any(values)}
    columns["bits_per_dim"] = torch.cat([found.scores.bits_per_dim for found in sets.values()]).tolist()
    if draws > 1:
        columns["bits_per_dim_sd"] = torch.cat([found.scores.spread for found in sets.values()]).tolist()
    return csv_text([tuple(columns), *zip(*columns.values(), strict=True)], digits=9)


def write_scores(path: Path, sets: Mapping[str, ScoredImages]) -> None:
    """Write :func:`score_csv` to ``path``, which is replaced whole or not at all."""
    write_text(path, score_csv(sets))
