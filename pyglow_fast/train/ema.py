"""Polyak averaging: an exponential moving average of the weights, which evaluation and sampling use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """An average of the weights: average += (1 - d) (weights - average), d = min(decay, (1 + t) / (10 + t)).

    The rising decay lets the average forget the first, quickly changing weights (as in TensorFlow's
    ExponentialMovingAverage with num_updates, which the released Glow uses).

    Args:
        model: the model whose parameters are averaged; buffers are not.
        decay: the largest share that the average keeps at an update, in (0, 1).

    Examples:
        >>> import torch
        >>> from pyglow_fast.train import Ema
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(0.0)
        >>> ema = Ema(model, decay=0.9)
        >>> _ = model.weight.data.fill_(1.0)
        >>> ema.update(updates=1)  # d = 2 / 11: nine elevenths of the way
        >>> with ema.applied():
        ...     print(f"{model.weight.item():.3f}")
        0.818
        >>> model.weight.item()
        1.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self.average = {name: value.detach().clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew with the weights as they are now (after a data-dependent initialisation)."""
        torch._foreach_copy_(list(self.average.values()), list(self._parameters.values()))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move the average towards the weights; ``updates`` is the number of updates that they had, t above."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.average.values()), list(self._parameters.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the averaged weights; afterwards it has its own again, bit for bit."""
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
