"""Reads images as a model takes them: pixels in batches, the middle of each grey level's interval, labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pyglow_fast.data import Batch, Images, batches
from pyglow_fast.likelihood import dequantize
from pyglow_fast.models import Glow
from pyglow_fast.train import labels_for

BATCH = 64  # images that go through the model at a time


def middles(pixels: Tensor, n_bins: int, model: Glow) -> Tensor:
    """Compute x on the model's device: the middle of each grey level's interval, (pixel + 1/2) / n_bins - 1/2."""
    like = model._parameter()
    half = torch.full(pixels.shape, 0.5, dtype=like.dtype)
    return dequantize(pixels, n_bins, dtype=like.dtype, noise=half).to(like.device)


def inputs(pixels: Tensor, labels: Tensor | None, n_bins: int, model: Glow) -> tuple[Tensor, Tensor | None]:
    """Turn images into what the model takes: (x, y), y the labels for a model with classes."""
    return middles(pixels, n_bins, model), labels_for(model, labels)


def read(images: Images, indices: Tensor, on_unreadable: str = "raise") -> Iterator[Batch]:
    """Read the images at ``indices`` in batches of BATCH; with "skip" fewer, where some cannot be read.

    Raises:
        UnreadableImageError: one that cannot be read.
    """
    parts = [part for part in indices.split(BATCH) if len(part)]
    plan: list[list[tuple[int, int | None]]] = [[(index, None) for index in part.tolist()] for part in parts]
    for batch, part in zip(batches(images, plan, on_unreadable=on_unreadable), parts, strict=True):
        own = batch.indices == part  # others stand in for unreadable ones
        if bool(own.all()):
            yield batch
        elif bool(own.any()):
            labels = None if batch.labels is None else batch.labels[own]
            yield replace(batch, pixels=batch.pixels[own], labels=labels, indices=batch.indices[own])


def name_of(images: Images, index: int, number: int | None = None) -> str:
    """Name an image in a few words: an emoji by its own name, others by number (``index`` if None) and class."""
    if images.name == "emoji" and images.groups:
        return images.groups[index]
    number = index if number is None else number
    if images.labels is None:
        return str(number)
    return f"{number}: {images.class_names[int(images.labels[index])]}"
