"""Makes the optimizers and the average of the weights, and has the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

OPTIMIZERS = ("adam", "adamw", "adamax")


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, beta2: float = 0.999
) -> torch.optim.Optimizer:
    """Make Adam, AdamW (decoupled weight decay) or Adamax (Glow's own) by its name in OPTIMIZERS; beta1 is 0.9."""
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, beta2)}
    if name == "adamax":
        return torch.optim.Adamax(parameters, **options)
    if name == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=weight_decay, **options)
    return torch.optim.Adam(parameters, **options)


def learning_rate(step: int, lr: float, warmup_steps: int = 0, decay_steps: int | None = None) -> float:
    """Compute the learning rate of a step (from 0): linear warm-up, half a cosine to a hundredth at ``decay_steps``."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if decay_steps is None:
        return lr * warm
    falling = max(1, decay_steps - warmup_steps)
    done = min(1.0, max(0.0, (step - warmup_steps) / falling))
    return lr * warm * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * done)))


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Make an average of the weights: average += (1 - d) (weights - average), d = min(decay, (1 + t) / (10 + t)).

    The first ``update_parameters(model)`` copies the weights, the t-th after it does the above, as in TensorFlow's
    ExponentialMovingAverage, which the released Glow uses. ``.module`` is a model with the averaged weights.
    """

    def average(averaged: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
        t = int(updates)
        torch._foreach_lerp_(averaged, weights, 1.0 - min(decay, (1 + t) / (10 + t)))

    return AveragedModel(model, multi_avg_fn=average).requires_grad_(False)  # type: ignore[arg-type]
