"""Finds which training images have an attribute: classes, the attributes of CelebA, the skin tones of emoji."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import DataConfig, Images
from pyglow_fast.data.celeba import attribute_table
from pyglow_fast.data.emoji import TONES
from pyglow_fast.studio.tones import tone_pairs
from pyglow_fast.train.seeds import derive, random_subset


@dataclass(frozen=True)
class Group:
    """The training images with an attribute, and those that they are compared with.

    Args:
        name: the name of the attribute.
        images: the indices of the images with it.
        others: indices of images without it; None: all the images of other groups that are not among ``images``.
    """

    name: str
    images: Tensor
    others: Tensor | None = None


def groups_of(config: DataConfig, data: Images, train: Tensor, held_out: Tensor, most: int, seed: int) -> list[Group]:
    """Find the attributes that images of a source have, each with at least one training image on both sides.

    Args:
        config: how the images were loaded.
        data: all images.
        train, held_out: the indices of the images that are trained on, and of those that are not.
        most: how many training images are used in all, shared evenly by the classes; emoji in pairs of skin tones come
            on top.
        seed: decides which images are drawn.

    Raises:
        ValueError: images of CelebA were left out as unreadable, so that indices are not those of its list.
    """
    scheme, _, path = config.name.partition(":")
    if scheme == "celeba":
        names, has = attribute_table(Path(path))
        # An image that was left out would shift the indices of all images behind it.
        found_images = f"{len(data)} that can be read"
        expect(len(data) == len(has), "attributes", f"all {len(has)} images of the list", found_images)
        drawn = train[random_subset(seed, len(train), most)]
        sides = [(name, drawn[has[drawn, i]], drawn[~has[drawn, i]]) for i, name in enumerate(names)]
        # The others are counted by themselves: some images have no attribute, and are in no group.
        return [Group(*side) for side in sides if min(map(len, side[1:])) > 0]
    found = []
    if data.labels is not None and len(data.class_names) > 1:
        share = max(1, most // len(data.class_names))
        for label, name in enumerate(data.class_names):
            own = train[data.labels[train] == label]
            found.append(Group(name, own[random_subset(derive(seed, label), len(own), share)]))
        found = [group for group in found if len(group.images)]
        found = found if len(found) > 1 else []
    return found + (_tones(config, data, held_out) if scheme == "emoji" else [])


def _tones(config: DataConfig, data: Images, held_out: Tensor) -> list[Group]:
    """The skin tones that training emoji come in."""
    found = []
    for tone in TONES.values():
        try:
            pairs = tone_pairs(tone, data, config, held_out)
        except ValueError:  # this tone is not among them
            continue
        found.append(Group(f"skin tone {tone}", pairs.train_variants, pairs.train_bases))
    return found


def drawn_images(groups: list[Group]) -> Tensor:
    """Collect the indices of all images of the groups, each once, sorted."""
    parts = [part for group in groups for part in (group.images, group.others) if part is not None]
    return torch.cat(parts).unique() if parts else torch.zeros(0, dtype=torch.int64)
