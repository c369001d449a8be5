"""Warns of images in another range, of a Glow that has seen no data, and of likelihoods that are not finite."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast.models.condition import fitted

Model = Any  # a Glow, which calls these functions


def warn_of_other_range(x: Tensor) -> None:
    """Warn where x is hardly centred: pixels in [0, 1], [-1, 1] or 0..255, as most loaders give them."""
    low, high = (float(value) for value in torch.aminmax(x.detach()))
    wide = -1 <= low < -0.6 and 0.6 < high <= 1  # samples and noise of a wider prior go beyond 1
    if not wide and (low < 0 or high <= 0.5):
        return
    levels = "127.5 * x + 127.5" if wide else "255 * x" if high <= 1 else "x"
    warnings.warn(
        f"x has values from {low:.4g} to {high:.4g}; pixels are expected in -0.5 to 0.5, or likelihoods are of other "
        f"images. For 256 grey levels: x = pyglow_fast.likelihood.dequantize(({levels}).round().long())",
        stacklevel=6,  # the line that calls log_prob
    )


def warn_of_fresh(stacklevel: int) -> None:
    """Warn that the actnorms of a model that is not trained have seen no data."""
    warnings.warn(
        "the model has seen no data: its actnorms are fresh, and what it samples or scores is noise. Load weights, or "
        "train first: the first forward in training mode, or model.initialize(x), sets the actnorms",
        stacklevel=stacklevel,
    )


def warn_of_not_finite(model: Model, x: Tensor, conds: Sequence[Tensor | None], log_prob: Tensor) -> None:
    """Warn that log_prob (N,) or (N, classes) is not finite, and name the weights or the first step that made it."""
    lost = int((~log_prob.isfinite()).reshape(len(x), -1).any(1).sum())
    # Other ranks would wait for what this one computes of shared weights.
    alone = not (dist.is_available() and dist.is_initialized())
    cause = f": {_cause(model, x, conds)}" if alone and model.memory != "frozen" else ""
    warnings.warn(
        f"log_prob is NaN or inf for {lost} of {len(log_prob)} images{cause}. After a step of training: a lower "
        "learning rate, a longer warm-up, or clipped gradients",
        stacklevel=4,
    )


@torch.no_grad()
def _cause(model: Model, x: Tensor, conds: Sequence[Tensor | None]) -> str:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name} is not finite"
    with torch.random.fork_rng([]):  # of nets that draw
        for i, level in enumerate(model.levels):
            for name, steps, squeezes in level.named_runs():
                x = functional.squeeze(x) if squeezes else x
                for k, step in enumerate(steps):
                    x, _ = step(x, fitted(conds[i], x.shape[2:]))
                    if not x.isfinite().all():
                        return f"levels.{i}.{name}.{k} is the first step whose output is not finite"
            if i < len(model.splits):
                x, _ = model.splits[i].parts(x)
    return "the output of every step is finite, its log-determinant or prior is not"
