"""Reads images to look at: which ones of a source, and as a model takes them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast.data import SOURCES, DataConfig, Images, ImageSet
from pyglow_fast.likelihood import dequantize
from pyglow_fast.models import Glow
from pyglow_fast.train.evaluation import labels_for

BATCH = 64  # images that go through the model at a time
PARTS = ("held-out", "train", "all")


class Selection(NamedTuple):
    """The images of a set that are looked at."""

    images: Images
    positions: Tensor  # int64, the place of each of them in the whole set
    train: Images | None  # the training images of the run, if the set is the run's own
    part: str  # one of PARTS


def middles(pixels: Tensor, n_bins: int, model: Glow) -> Tensor:
    """Compute x on the model's device: the middle of each grey level's interval, (pixel + 1/2) / n_bins - 1/2."""
    like = model._parameter()
    half = torch.full(pixels.shape, 0.5, dtype=like.dtype)
    return dequantize(pixels, n_bins, dtype=like.dtype, noise=half).to(like.device)


def inputs(pixels: Tensor, labels: Tensor | None, n_bins: int, model: Glow) -> tuple[Tensor, Tensor | None]:
    """Turn images into what the model takes: (x, y), y the labels for a model with classes."""
    return middles(pixels, n_bins, model), labels_for(model, labels)


def name_of(images: Images, index: int) -> str:
    """Name an image in a few words: an emoji by its own name, others by number and class."""
    if images.name.startswith("emoji") and images.groups:
        return images.groups[index]
    return str(index) if images.labels is None else f"{index}: {images.class_names[int(images.labels[index])]}"


def config_for(name: str, stored: DataConfig, model: Glow) -> DataConfig:
    """Make the settings by which ``name`` is prepared to fit a model trained on ``stored``."""
    plain = DataConfig(name, held_out=stored.held_out)
    if plain.scheme == stored.scheme:
        return replace(stored, name=name)
    channels, *sides = model.config.image_shape
    expect(len(set(sides)) == 1 and channels in (1, 3), "data", f"images of shape {(channels, *sides)}", repr(name))
    wanted: dict[str, Any] = {"size": sides[0], "gray": channels == 1, "n_bits": stored.n_bits}
    return replace(plain, **{key: value for key, value in wanted.items() if key in SOURCES[plain.scheme].options})


def brought_to(model: Glow, n_bins: int, images: Images) -> Images:
    """Give images in memory the channels and grey levels of a model, with a warning; black stays black, white white.

    Grey becomes three equal channels. Fewer levels lose what the model's own images have lost, more of them nothing.
    """
    shape, wanted = images.image_shape, model.config.image_shape
    if not isinstance(images, ImageSet):  # files, which were read as the model takes them
        return images
    values, said = images.pixels, []
    if shape[0] == 1 < wanted[0]:
        values = values.expand(-1, wanted[0], -1, -1)
        said.append(f"grey becomes {wanted[0]} equal channels")
    if images.n_bins != n_bins:
        said.append(f"{images.n_bins} grey levels become {n_bins}")
        most = images.n_bins - 1
        spread = (values.int() * (n_bins - 1) + most // 2) // most  # rounded
        values = (spread if n_bins > images.n_bins else values.int() * n_bins // images.n_bins).to(torch.uint8)
    if said:
        warnings.warn(f"{images.name}: {', '.join(said)}, as the model takes images", stacklevel=3)
    return replace(images, pixels=values, n_bins=n_bins)
