"""Polyak averaging: an exponential moving average of the weights, which evaluation and sampling use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """average <- average + (1 - d_t) (weights - average), d_t = min(decay, (1 + t) / (10 + t)), t updates done.

    The rising decay lets the average forget the first, quickly changing weights (as in TensorFlow's
    ExponentialMovingAverage with num_updates, which the released Glow uses).

    Args:
        model: whose parameters are averaged; buffers are not.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin with the weights as they are now (after a data-dependent initialisation)."""
        torch._foreach_copy_(list(self.average.values()), list(self._parameters.values()))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after ``updates`` updates."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights for a while; then its own again, to the bit."""
        own = [value.detach().clone() for value in self._parameters.values()]
        # Copies rather than an exchange of storage: caches of folded weights notice them by the tensors' versions.
        try:
            self._fill(list(self.average.values()))
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def load(self, average: dict[str, Tensor]) -> None:
        """Go on from a saved average, whose names and shapes are those of the parameters."""
        for name, value in self.average.items():
            value.copy_(average[name])
