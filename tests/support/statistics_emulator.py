"""The sums over values of pyglow::cuda, and the normal distribution's passes, run by the emulator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from support.emulator import Emulator, _view


class StatisticsEmulator(Emulator):
    """All tensors (N, C, P); mean and log_sd of the normal distribution may have strides of zero.

    ``room`` gives memory for outputs, if it is not to be of the layout ``out_layout``.
    """

    room: Callable[[Tensor], Tensor] | None = None

    def output_like(self, x: Tensor) -> Tensor:
        """Room for an output of the shape of x."""
        return super().output_like(x) if self.room is None else self.room(x)

    def channel_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and sum of squared deviations per channel, float64."""
        mean, m2 = (torch.full((x.shape[1],), torch.nan, dtype=torch.float64) for _ in range(2))
        self._call("channel_moments", x, 0, _view(x), mean, m2)
        return mean, m2

    def gaussian_log_prob(self, z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
        """log N(z; mean, exp(log_sd)) summed per sample."""
        log_prob = z.new_full((z.shape[0],), torch.nan)
        self._call("gaussian_log_prob", z, 0, _view(z), _view(mean), _view(log_sd), log_prob)
        return log_prob

    def gaussian_log_prob_backward(
        self, z: Tensor, mean: Tensor, log_sd: Tensor, grad_log_prob: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of z, mean and log_sd, each of the full shape."""
        grads = (self.output_like(z), self.output_like(z), self.output_like(z))
        inputs = (_view(z), _view(mean), _view(log_sd), grad_log_prob)
        self._call("gaussian_log_prob_backward", z, 0, *inputs, *map(_view, grads))
        return grads

    def gaussian_sample(self, noise: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
        """mean + exp(log_sd) noise."""
        z = self.output_like(noise)
        self._call("gaussian_sample", noise, 0, _view(noise), _view(mean), _view(log_sd), _view(z))
        return z
