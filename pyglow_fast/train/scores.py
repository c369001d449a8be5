"""Scores single images by bits/dim, and writes them as CSV text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyglow_fast._core.errors import visible
from pyglow_fast.data import Images, LazyImages
from pyglow_fast.data.lazy import FileReader
from pyglow_fast.train.evaluation import ImageScores
from pyglow_fast.train.metrics import Cell, csv_text

NAMED = 5  # images that are named in a line about many


@dataclass(frozen=True)
class ScoredImages:
    """Images of a set, all or some of which were scored, and the bits/dim that a model gives each of them.

    ``positions``, int64 (len(images),), are the indices of the images in the set that they come from; None: as here.
    """

    images: Images
    scores: ImageScores
    positions: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """The scores that are finite, as a mask, bool (n,)."""
        return self.scores.bits_per_dim.isfinite()

    def position(self, index: int) -> int:
        """The place of image ``index`` in the set that it comes from."""
        return index if self.positions is None else int(self.positions[index])

    def name(self, index: int) -> str:
        """The file of image ``index`` where images are read when needed, else the key of its group, or ""."""
        images = self.images
        if isinstance(images, LazyImages) and isinstance(images.pixels, FileReader):
            return images.pixels.names[images.position(index)]
        return images.groups[index] if images.groups else ""

    def label(self, index: int) -> str:
        """The name of image ``index``'s class, or "" without labels."""
        labels = self.images.labels
        return "" if labels is None else self.images.class_names[int(labels[index])]

    def complaints(self) -> list[str]:
        """Write lines about images without a finite score, and about those that could not be read."""
        found = {
            "without a finite likelihood, left out of the figures": self.scores.indices[~self.finite].tolist(),
            "that cannot be read": list(self.scores.unreadable),
        }
        lines = []
        for what, indices in found.items():
            names = [(self.position(i), visible(self.name(i))) for i in indices]
            shown = ", ".join(f"{i} ({name})" if name else f"{i}" for i, name in names[:NAMED])
            more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
            if indices:
                lines.append(f"{len(indices)} image{'s' if len(indices) > 1 else ''} {what}: {shown}{more}")
        return lines


def score_csv(sets: Mapping[str, ScoredImages]) -> str:
    """Write a line for each image as CSV text: set, index, name, label, bits_per_dim.

    Columns are left out that would say nothing, such as ``set`` for a single one.
    """
    rows = []
    for name, found in sets.items():
        scores = found.scores
        for i, bits in zip(scores.indices.tolist(), scores.bits_per_dim.tolist(), strict=True):
            rows.append((name, found.position(i), found.name(i), found.label(i), bits))
    shown = {
        "set": len(sets) > 1,
        "index": True,
        "name": any(row[2] for row in rows),
        "label": any(row[3] for row in rows),
        "bits_per_dim": True,
    }
    table: list[Sequence[Cell]] = [tuple(shown), *rows]
    return csv_text([list(itertools.compress(row, shown.values())) for row in table], digits=9)
