"""What every data source gives: integer images in memory, and the ways to cut them up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect


@dataclass(frozen=True)
class ImageSet:
    """Images as integer levels.

    Args:
        name: what the user calls it, such as ``digits``.
        levels: uint8 (N, C, H, W), values in 0..n_bins-1.
        n_bins: number of levels, 2..256.
        labels: int64 (N,) in 0..len(class_names)-1, or None.
        class_names: one per class; empty without labels.
        groups: one key an image; images of one group (a photo's tiles, say) never part in :func:`split`. Empty: each
            image is its own group.

    Raises:
        ValueError: wrong shape or dtype, a level outside 0..n_bins-1, or labels that do not fit.
    """

    name: str
    levels: Tensor
    n_bins: int
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        levels = self.levels
        expect(2 <= self.n_bins <= 256, "n_bins", "a value in 2..256", self.n_bins)
        expect(levels.dtype == torch.uint8, "levels", "dtype uint8", levels.dtype)
        expect(levels.dim() == 4, "levels", "shape (N, C, H, W)", tuple(levels.shape))
        expect(len(levels) > 0, "levels", "at least one image", tuple(levels.shape))
        top = int(levels.max())
        last = self.n_bins - 1
        expect(top <= last, "levels", f"values in 0..{last} (n_bins={self.n_bins})", f"a value of {top}")
        expect(not self.groups or len(self.groups) == len(levels), "groups", f"{len(levels)} keys", len(self.groups))
        if self.labels is not None:
            expect(self.labels.shape == levels.shape[:1], "labels", f"shape ({len(levels)},)", tuple(self.labels.shape))
            low, high, n = int(self.labels.min()), int(self.labels.max()), len(self.class_names)
            expect(low >= 0 and high < n, "labels", f"values in 0..{n - 1}", f"{low}..{high}")

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.levels.shape[1:]
        return channels, height, width

    @property
    def n_dims(self) -> int:
        """D = C*H*W, the dimensions that bits/dim divides by."""
        return self.levels[0].numel()

    def subset(self, indices: Tensor | Sequence[int]) -> ImageSet:
        """The images at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        labels = None if self.labels is None else self.labels[index]
        groups = tuple(self.groups[i] for i in index.tolist()) if self.groups else ()
        return ImageSet(self.name, self.levels[index], self.n_bins, labels, self.class_names, groups)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """(levels uint8 (n, C, H, W), labels (n,) or None) at ``indices``."""
        return self.levels[indices], None if self.labels is None else self.labels[indices]

    def fingerprint(self) -> str:
        """A digest of everything a run depends on: a resumed run must see the same images in the same order."""
        digest = hashlib.sha256(f"{tuple(self.levels.shape)} {self.n_bins} {self.class_names}".encode())
        digest.update(self.levels.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        digest.update("\0".join(self.groups).encode())
        return digest.hexdigest()[:32]


def split(data: ImageSet, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, held-out), each sorted: whole groups are drawn at random until their images reach the fraction.

    Args:
        data: the images.
        held_out: fraction of the images to hold out, in (0, 1).
        seed: of the draw; the same data and seed give the same split everywhere.

    Raises:
        ValueError: a fraction outside (0, 1), or fewer than two groups, so that one side would be empty.
    """
    expect(0.0 < held_out < 1.0, "held_out", "a fraction between 0 and 1", held_out)
    keys = data.groups or tuple(str(i) for i in range(len(data)))
    names = sorted(set(keys))
    expect(len(names) >= 2, "data", "at least 2 images (or groups of images) to hold some out", len(names))
    members: dict[str, list[int]] = {name: [] for name in names}
    for i, key in enumerate(keys):
        members[key].append(i)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = max(1, round(held_out * len(data)))
    held: list[int] = []
    for position in order[:-1]:  # the last group is never held out, so there is always something to train on
        if len(held) >= wanted:
            break
        held += members[names[position]]
    chosen = torch.zeros(len(data), dtype=torch.bool)
    chosen[held] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
