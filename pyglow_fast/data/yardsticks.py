"""Says what a set of images is, and what a bits/dim figure of it is worth: simple models and codecs beside it."""

from __future__ import annotations

import contextlib
import io
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast.data._optional import optional
from pyglow_fast.data.config import DataConfig
from pyglow_fast.data.fetch import data_folder
from pyglow_fast.data.files import FORMATS, find_images
from pyglow_fast.data.image_set import Images, ImageSet, split
from pyglow_fast.data.sources import load_data

# PNG at its highest effort runs at some MB/s, so of a large set only the first images are coded; the result says so.
PNG_MAX_VALUES = 1 << 24
# Of a set that is not in memory only some images are read, spread evenly over it; the result says so.
READ_MAX_IMAGES = 4096
READ_MAX_VALUES = 1 << 28
_VALUES_MAX = 1 << 22  # that the histogram model looks at, or counters that it holds, at a time
NAMED = 50  # classes that are listed


@dataclass(frozen=True)
class Yardstick:
    """A figure to set beside a model's: ``bits_per_dim`` of ``images`` images, and in words how it was measured."""

    name: str
    bits_per_dim: float
    images: int
    how: str


def read_some(data: Images) -> ImageSet:
    """Reads the central windows of the images into memory; of a set that is not there, some of them."""
    if isinstance(data, ImageSet):
        return ImageSet(data.name, data.augmentation.central(data.pixels), data.n_bins)
    count = min(len(data), READ_MAX_IMAGES, max(1, READ_MAX_VALUES // data.n_dims))
    pixels, _ = data.batch(data.without_skipped(torch.arange(count) * len(data) // count))
    return ImageSet(data.name, pixels, data.n_bins)


def histogram_bits_per_dim(train: Images, test: Images) -> float:
    """Computes the mean bits/dim of ``test`` under independent pixels, (count in ``train`` + 1) / (N + n_bins)."""
    same = (test.image_shape, test.n_bins) == (train.image_shape, train.n_bins)
    expect(same, "test", f"images of shape {train.image_shape}, n_bins {train.n_bins}", (test.image_shape, test.n_bins))
    fitted, measured = read_some(train), read_some(test)
    width = max(1, _VALUES_MAX // max(len(fitted), len(measured), train.n_bins))
    parts, nats = (part.pixels.flatten(1).split(width, 1) for part in (fitted, measured)), 0.0
    for fit, held in zip(*parts, strict=True):
        counts = torch.ones(train.n_bins, fit.shape[1], dtype=torch.float64)
        counts.scatter_add_(0, fit.long(), torch.ones(fit.shape, dtype=torch.float64))
        nats -= float((counts / (len(fitted) + train.n_bins)).log().gather(0, held.long()).sum())
    return nats / (math.log(2.0) * len(measured) * test.n_dims)


def _layouts(pixels: Tensor) -> Iterator[Tensor]:
    """All images in one picture (H, W, C): as a near-square sheet and as one column."""
    n, channels, height, width = pixels.shape
    columns = max(1, math.isqrt(n))
    while n % columns:  # a divisor, so that no padding is coded
        columns -= 1
    for across in {columns, 1}:
        grid = pixels.reshape(n // across, across, channels, height, width).permute(0, 3, 1, 4, 2)
        yield grid.reshape(n // across * height, across * width, channels)


def png_bits_per_dim(test: Images) -> tuple[float, int]:
    """Computes (bits/dim, number of images) of one PNG of all images of ``test``, the smallest of several encodings."""
    pil = optional("PIL.Image", "the PNG yardstick")
    read = read_some(test)
    count = min(len(read), max(1, PNG_MAX_VALUES // test.n_dims))
    pixels = read.pixels[:count]
    if test.image_shape[0] not in (1, 3):  # PNG has no such pixels: one grey picture a channel
        pixels = pixels.flatten(0, 1).unsqueeze(1)
    sizes = []
    for layout in _layouts(pixels):
        array = layout.contiguous().numpy()
        variants = [pil.fromarray(array[..., 0] if array.shape[2] == 1 else array)]
        if array.shape[2] == 1:  # Pillow filters grey rows and leaves palette rows alone: smaller, at times
            palette = variants[0].copy()
            palette.putpalette([value for level in range(test.n_bins) for value in (level, level, level)])
            variants.append(palette)
        for variant in variants:
            for strategy in range(4):
                buffer = io.BytesIO()
                variant.save(buffer, "PNG", compress_level=9, compress_type=strategy)
                sizes.append(buffer.tell())
    return 8.0 * min(sizes) / (count * test.n_dims), count


def measure_yardsticks(train: Images | None, test: Images) -> list[Yardstick]:
    """Measures on ``test`` the histogram model fitted on ``train`` (left out if None), and PNG."""
    read, found = read_some(test), []
    of_more = "" if len(read) == len(test) else f" of {len(test)}"
    if train is not None:
        fitted = read_some(train)
        of_all = "" if len(fitted) == len(train) else f" of {len(train)}"
        how = f"per-pixel categorical with add-one smoothing, fitted on {len(fitted)}{of_all} training images"
        how += f", measured on {len(read)}{of_more}" if of_more else ""
        found.append(Yardstick("histogram", histogram_bits_per_dim(fitted, read), len(read), how))
    bits, count = png_bits_per_dim(read)
    found.append(Yardstick("PNG", bits, count, f"one optimised PNG of {count}{of_more} tiled images"))
    return found


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
