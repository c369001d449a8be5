"""Says what the images of a set are, before anything is trained on them."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path

import torch

from pyglow_fast.data._optional import optional
from pyglow_fast.data.config import DataConfig
from pyglow_fast.data.fetch import data_folder
from pyglow_fast.data.files import FORMATS, find_images
from pyglow_fast.data.image_set import Images, split
from pyglow_fast.data.sources import load_data
from pyglow_fast.data.yardsticks import READ_MAX_IMAGES, Yardstick, measure_yardsticks, read_some

NAMED = 50  # classes that are listed


def look_over(config: DataConfig, seed: int = 0) -> tuple[list[str], list[Yardstick], Images]:
    """Describe the images that ``config`` names: lines for people, yardsticks, and those of them to train on."""
    data = load_data(config)
    train, held_out = (data.subset(side) for side in split(data, config.held_out, seed))
    lines = [f"{data.name}: {len(data)} images of shape {data.image_shape} with {data.n_bins} grey levels"]
    lines[0] += f", {len(train)} to train on and {len(held_out)} held out"
    if data.labels is not None:
        counts = data.labels.bincount(minlength=len(data.class_names)).tolist()
        classes = [*map("{} {}".format, data.class_names, counts)]
        rest = [f"and {len(classes) - NAMED} more"] if len(classes) > NAMED else []
        lines.append("classes: " + ", ".join(classes[:NAMED] + rest))
    scheme, _, path = config.name.partition(":")
    root, files = Path(path) if path else data_folder() / scheme, []
    paths = find_images(root) if root.is_dir() else []
    for file in paths[:: 1 + len(paths) // READ_MAX_IMAGES]:
        with contextlib.suppress(Exception), optional("PIL.Image", "image files").open(file, formats=FORMATS) as image:
            files.append((math.prod(image.size), "{}x{}".format(*image.size), image.mode))
    if files:
        files.sort()
        small, median, large = (files[i][1] for i in (0, len(files) // 2, -1))
        modes = ", ".join(f"{mode} {n}" for mode, n in Counter(mode for *_, mode in files).most_common())
        lines.append(f"{len(files)} files: {small} the smallest, {median} the median, {large} the largest; {modes}")
    seen = read_some(data)
    moments = [torch.std_mean(channel.float(), correction=0) for channel in seen.pixels.unbind(1)]
    white = data.n_bins - 1
    deviation, mean = (" ".join(f"{value / white:.3f}" for value in values) for values in zip(*moments, strict=True))
    lines.append(f"of {len(seen)} images, by channel, white as 1: mean {mean}, deviation {deviation}")
    return lines, measure_yardsticks(train, held_out), train
