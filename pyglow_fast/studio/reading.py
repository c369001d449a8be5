"""Reads images to look at: which ones of a source, and as a model takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import DataConfig, Images, load_data, options_of, split
from pyglow_fast.likelihood import dequantize
from pyglow_fast.models import Glow
from pyglow_fast.train import Checkpoint, check_fits, labels_for

BATCH = 64  # images that go through the model at a time
PARTS = ("held-out", "train", "all")


def middles(pixels: Tensor, n_bins: int, model: Glow) -> Tensor:
    """Compute x on the model's device: the middle of each grey level's interval, (pixel + 1/2) / n_bins - 1/2."""
    like = model._parameter()
    half = torch.full(pixels.shape, 0.5, dtype=like.dtype)
    return dequantize(pixels, n_bins, dtype=like.dtype, noise=half).to(like.device)


def inputs(pixels: Tensor, labels: Tensor | None, n_bins: int, model: Glow) -> tuple[Tensor, Tensor | None]:
    """Turn images into what the model takes: (x, y), y the labels for a model with classes."""
    return middles(pixels, n_bins, model), labels_for(model, labels)


def name_of(images: Images, index: int, number: int | None = None) -> str:
    """Name an image in a few words: an emoji by its own name, others by number (``index`` if None) and class."""
    if images.name.startswith("emoji") and images.groups:
        return images.groups[index]
    number = index if number is None else number
    return str(number) if images.labels is None else f"{number}: {images.class_names[int(images.labels[index])]}"


def config_for(name: str, stored: DataConfig, model: Glow) -> DataConfig:
    """Make the settings by which ``name`` is prepared to fit a model trained on ``stored``."""
    if name.partition(":")[0] == stored.name.partition(":")[0]:
        return replace(stored, name=name)
    plain = DataConfig(name, held_out=stored.held_out)
    channels, *sides = model.config.image_shape
    expect(len(set(sides)) == 1 and channels in (1, 3), "data", f"images of shape {(channels, *sides)}", repr(name))
    wanted: dict[str, Any] = {"size": sides[0], "gray": channels == 1, "n_bits": stored.n_bits}
    return replace(plain, **{key: value for key, value in wanted.items() if key in options_of(name)})


class Selection(NamedTuple):
    """The images of a set that are looked at."""

    images: Images
    positions: Tensor  # int64, the place of each of them in the whole set
    train: Images | None  # the training images of the run, if the set is the run's own
    part: str  # one of PARTS


def selection(name: str, part: str | None, checkpoint: Checkpoint, model: Glow) -> Selection:
    """Load the images ``name`` (see DATA_HELP), prepared for the model, of which ``part`` (see PARTS) is looked at.

    By default that is held-out of the run's own images, and all of any others. What does not fit is refused.
    """
    config = checkpoint.config
    data = load_data(config_for(name, config.data, model))
    check_fits(model, data, checkpoint.data.n_bins)
    own = data.fingerprint() == checkpoint.data.fingerprint
    part = part or ("held-out" if own else "all")
    everything = torch.arange(len(data))
    if not own:
        expect(part == "all", "part", "all, since these are not the images of the run", part)
        return Selection(data, everything, None, part)
    train, held_out = split(data, config.data.held_out, config.seed)
    positions = {"held-out": held_out, "train": train, "all": everything}[part]
    return Selection(data if part == "all" else data.subset(positions), positions, data.subset(train), part)


def own_images(checkpoint: Checkpoint) -> tuple[Images, Tensor, Tensor]:
    """Load (all images of a run, indices of its training images, indices of its held-out ones).

    Images that are no longer where they were, or have changed since, are refused.
    """
    config = checkpoint.config
    data = load_data(config.data)
    same = data.fingerprint() == checkpoint.data.fingerprint
    expect(same, "data", f"the images of {config.data.name} that the run was trained on", "others")
    return data, *split(data, config.data.held_out, config.seed)


def trained_on(checkpoint: Checkpoint) -> Images | None:
    """Load the run's training images, if they are still where they were and as they were."""
    try:
        data, train, _ = own_images(checkpoint)
    except ValueError:
        return None
    return data.subset(train)
