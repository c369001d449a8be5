"""The optimizers, the average of the weights, and the schedule of the learning rate."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._core import torch_private
from pyglow_fast.models import Glow

OPTIMIZERS = ("adam", "adamw", "adamax")
FUSED = ("adam", "adamw")  # those that torch has in one kernel, which can leave an update out by itself


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float = 0.0, beta2: float = 0.999
) -> torch.optim.Optimizer:
    """Make Adam, AdamW (decoupled weight decay) or Adamax (Glow's own) by its name in OPTIMIZERS; beta1 is 0.9.

    With a learning rate that is a tensor on their device the first two are fused, and a CUDA graph may hold them.
    """
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, beta2)}
    if isinstance(lr, Tensor):
        options |= {"fused": True, "capturable": lr.device.type == "cuda"}
    if name == "adamax":
        return torch.optim.Adamax(parameters, **options)
    if name == "adamw":
        return torch.optim.AdamW(parameters, weight_decay=weight_decay, **options)
    return torch.optim.Adam(parameters, **options)


def learning_rate(step: int, lr: float, warmup_steps: int = 0, decay_steps: int | None = None) -> float:
    """Compute the rate of a step (from 0): linear warm-up, times a straight line to 0 at ``decay_steps``."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return lr * warm * (1.0 if decay_steps is None else max(0.0, 1.0 - step / max(1, decay_steps)))


class Average(nn.Module):
    """average += (1 - d) (weights - average), d = min(decay, (1 + t) / (10 + t)) at the t-th update from 1.

    It begins with the weights that it is made of, as TensorFlow's ExponentialMovingAverage does, which the released
    Glow uses. ``module`` is a model with the averaged weights. Everything is on its device: a CUDA graph may hold it.
    """

    updates: Tensor

    def __init__(self, model: Glow, decay: float) -> None:
        super().__init__()
        self.module: Glow = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay
        device = next(model.parameters()).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.float64, device=device))

    @torch.no_grad()
    def begin(self, model: Glow) -> None:
        """Begin anew with the weights and buffers of ``model``, also what a state_dict lacks or names otherwise."""
        for own, theirs in (
            *zip(self.module.parameters(), model.parameters(), strict=True),
            *zip(self.module.buffers(), model.buffers(), strict=True),
        ):
            own.copy_(theirs)
        self.updates.zero_()

    @torch.no_grad()
    def update(self, model: Glow, taken: Tensor) -> None:
        """Move towards the weights of ``model`` where ``taken``, a bool tensor (); else stay."""
        self.updates.add_(taken)
        own, theirs = list[Tensor](self.module.parameters()), list[Tensor](model.parameters())
        share = (1.0 - ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)) * taken
        moves = torch_private.subtract_each(theirs, own)
        torch_private.multiply_each_(moves, share.to(own[0].dtype))
        torch_private.add_to_each_(own, moves)
