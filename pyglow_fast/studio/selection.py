"""Selects the images of a source that are looked at: the run's own held-out ones, or others altogether."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import DataConfig, Images, load_data, options_of, split
from pyglow_fast.models import Glow
from pyglow_fast.train import Checkpoint, check_fits

PARTS = ("held-out", "train", "all")


def config_for(name: str, stored: DataConfig, model: Glow) -> DataConfig:
    """Make the settings by which ``name`` is prepared to fit a model trained on ``stored``."""
    if name.partition(":")[0] == stored.name.partition(":")[0]:
        return replace(stored, name=name)
    plain = DataConfig(name, held_out=stored.held_out)
    channels, *sides = model.config.image_shape
    expect(len(set(sides)) == 1 and channels in (1, 3), "data", f"images of shape {(channels, *sides)}", repr(name))
    wanted: dict[str, Any] = {"size": sides[0], "gray": channels == 1, "n_bits": stored.n_bits}
    return replace(plain, **{key: value for key, value in wanted.items() if key in options_of(name)})


@dataclass(frozen=True)
class Selection:
    """The images of a set that are looked at.

    Args:
        images: the images that are looked at.
        positions: int64, the place of each of them in the whole set.
        train: the training images of the run; None if the set is not the run's own.
        part: one of PARTS.
    """

    images: Images
    positions: Tensor
    train: Images | None
    part: str


def selection(name: str, part: str | None, checkpoint: Checkpoint, model: Glow) -> Selection:
    """Load the images ``name``, prepared for the model, of which ``part`` is looked at.

    Args:
        name: a source, see DATA_HELP.
        part: one of PARTS; None: held-out of the run's own images, all of any others.
        checkpoint, model: the run's.

    Raises:
        ValueError: images that do not fit the model, or a part that they do not have.
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

    Raises:
        ValueError: they are no longer where they were, or have changed since.
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
