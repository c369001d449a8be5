"""Which images of DATA a command looks at: the run's own held-out ones, or others altogether."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import DATA_HELP, DataConfig, Images, load_data, options_of, split
from pyglow_fast.models import Glow
from pyglow_fast.train import Checkpoint, check_fits

PARTS = ("held-out", "train", "all")


def add_images(parser: argparse.ArgumentParser) -> None:
    """DATA and which part of it."""
    parser.add_argument("data", metavar="DATA", help=f"{DATA_HELP}; prepared as the run's own images were")
    parser.add_argument("--part", choices=PARTS, help="default: held-out of the run's own images, all of any others")


def config_for(name: str, stored: DataConfig, model: Glow) -> DataConfig:
    """How ``name`` is prepared to fit a model trained on ``stored``."""
    if name.partition(":")[0] == stored.name.partition(":")[0]:
        return replace(stored, name=name)
    plain = DataConfig(name, held_out=stored.held_out)
    channels, *sides = model.config.image_shape
    expect(len(set(sides)) == 1 and channels in (1, 3), "data", f"images of shape {(channels, *sides)}", repr(name))
    wanted: dict[str, Any] = {"size": sides[0], "gray": channels == 1, "n_bits": stored.n_bits}
    return replace(plain, **{key: value for key, value in wanted.items() if key in options_of(name)})


@dataclass(frozen=True)
class Selection:
    """Which of a set of images are looked at.

    Args:
        images: those that are.
        positions: int64, where in the whole set each of them is.
        train: the training images of the run; None if the set is not the run's own.
        part: one of PARTS.
    """

    images: Images
    positions: Tensor
    train: Images | None
    part: str


def images_of(args: argparse.Namespace, checkpoint: Checkpoint, model: Glow) -> tuple[Images, Images | None, str]:
    """(the images to look at, the run's training images or None if DATA is not the run's, the part in words).

    Raises:
        ValueError: images that do not fit the model, or a part that they do not have.
    """
    found = selection(args.data, args.part, checkpoint, model)
    return found.images, found.train, found.part


def selection(name: str, part: str | None, checkpoint: Checkpoint, model: Glow) -> Selection:
    """The images ``name``, prepared for the model, of which ``part`` is looked at: see :func:`images_of`."""
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


def trained_on(checkpoint: Checkpoint) -> Images | None:
    """The run's training images, if they are still where they were and as they were."""
    try:
        data = load_data(checkpoint.config.data)
    except ValueError:
        return None
    if data.fingerprint() != checkpoint.data.fingerprint:
        return None
    return data.subset(split(data, checkpoint.config.data.held_out, checkpoint.config.seed)[0])
