"""Bits per dimension of a model over a set of images, with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyglow_fast._errors import expect
from pyglow_fast.data import Images, batches
from pyglow_fast.likelihood import bits_per_dim
from pyglow_fast.models import Glow
from pyglow_fast.train.feed import noisy
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import derive, random_subset


@dataclass(frozen=True)
class Score:
    """Mean bits/dim over ``images`` images and the standard error of that mean over the images.

    ``unreadable`` more images could not be read and are left out.
    """

    mean: float
    standard_error: float
    images: int
    unreadable: int = 0

    @property
    def error_text(self) -> str:
        """The standard error for people; one image has none."""
        return f"{self.standard_error:.3f}" if self.images > 1 else "n/a"


def device_of(model: Glow) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def labels_for(model: Glow, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Labels on the model's device, or None for a model without classes.

    Raises:
        ValueError: a model with classes and images without labels.
    """
    if model.config.n_classes is None:
        return None
    expect(labels is not None, "data", "images with labels, since the model has classes", "none")
    assert labels is not None
    return labels.to(device_of(model))


def check_fits(model: Glow, data: Images, n_bins: int) -> None:
    """Refuse images that are not of the model's shape, or not of the number of levels that it was trained on."""
    expect(
        data.image_shape == model.config.image_shape,
        "data",
        f"images of shape {tuple(model.config.image_shape)}, as the model was trained on",
        data.image_shape,
    )
    expect(data.n_bins == n_bins, "data", f"n_bins {n_bins}, as the model was trained on", data.n_bins)
    n_classes = model.config.n_classes
    if n_classes is not None:
        found = len(data.class_names)
        expect(found == n_classes, "data", f"{n_classes} classes, as the model was trained on", found)


@torch.no_grad()
def evaluate(
    model: Glow,
    data: Images,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    workers: int = 0,
    on_unreadable: str = "raise",
    ranks: Ranks | None = None,
) -> Score:
    """Score ``data``, each image with dequantisation noise of its own that is the same at every call.

    Args:
        model: put in evaluation mode for the call.
        data: the images.
        batch_size: images at a time.
        seed: of the noise, and of which images are looked at.
        limit: most images to look at, drawn at random since the first ones may all be of one class; None: all.
        workers, on_unreadable: see :func:`pyglow_fast.data.batches`.
        ranks: share the images among these; every rank gets the whole score.

    Raises:
        ValueError: images that do not fit the model; one that cannot be read, or with "skip" none that can.
    """
    ranks = ranks or Ranks()
    check_fits(model, data, data.n_bins)
    device, n_values = device_of(model), model.config.n_values
    chosen = random_subset(seed, len(data), len(data) if limit is None else limit)
    plan: list[list[tuple[int, int | None]]] = [
        [(index, None) for index in part.tolist()] for part in ranks.share(chosen).split(batch_size) if len(part)
    ]
    was_training = model.training
    model.eval()
    bits = [torch.zeros(0, dtype=torch.float64)]
    try:
        for batch, wanted in zip(batches(data, plan, workers, on_unreadable), plan, strict=True):
            keys = [derive(seed, "noise", index) for index, _ in wanted]
            x = noisy(batch.levels, keys, data.n_bins, device)
            log_prob = model.log_prob(x, labels_for(model, batch.labels))
            own = batch.indices == torch.tensor([index for index, _ in wanted])  # others stand in for unreadable ones
            bits.append(bits_per_dim(log_prob, n_values, data.n_bins).double().cpu()[own])
    finally:
        model.train(was_training)
    values = torch.cat(bits)
    total, count = ranks.total(float(values.sum()), len(values))
    n, mean = int(count), total / max(1.0, count)
    expect(n > 0, "data", f"at least one image that can be read in {data.name}", f"none of {len(chosen)}")
    squares = ranks.total(float((values - mean).square().sum()))[0]
    return Score(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan, n, len(chosen) - n)
