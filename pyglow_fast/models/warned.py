"""What a Glow warns of: images in another range, a model that has seen no data, likelihoods that are not finite."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyglow_fast.models.condition import Condition

if TYPE_CHECKING:
    from pyglow_fast.models.glow import Glow


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


def warn_of_not_finite(model: Glow, x: Tensor, cond: Condition | None, log_prob: Tensor) -> None:
    """Warn that some of ``log_prob`` are NaN or inf, and name the weights or the first step that they come from."""
    lost = int((~log_prob.isfinite()).sum())
    warnings.warn(
        f"log_prob is NaN or inf for {lost} of {len(log_prob)} images: {_culprit(model, x, cond)}. After a step of "
        "training: a lower learning rate, a longer warm-up, or clipped gradients",
        stacklevel=4,
    )


@torch.no_grad()
def _culprit(model: Glow, x: Tensor, cond: Condition | None) -> str:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name} is not finite"
    config = model.config
    if model.memory == "frozen" or config.n_checkerboard + config.n_last_checkerboard:
        return "all weights are finite"  # intermediates() does not show the states between the steps of these
    inner = range(config.n_transitions + config.n_steps - 1)
    for i, states in enumerate(model.intermediates(x, cond, inner)[1]):
        for k, state in enumerate(states):
            if not state.isfinite().all():
                return f"levels.{i}.steps.{k} is the first step whose output is not finite"
    return "the output of every step is finite, its log-determinant or prior is not"
