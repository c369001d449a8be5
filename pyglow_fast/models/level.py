"""One level of a Glow."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyglow_fast.layers import FlowStep, FrozenSteps, ReversibleSequence, Squeeze
from pyglow_fast.layers.reshape import fit_condition
from pyglow_fast.models.config import GlowConfig
from pyglow_fast.reference import CouplingSpec


class FlowLevel(nn.Module):
    """One level: squeeze, then K flow steps whose parameter work is done in one batch."""

    def __init__(self, config: GlowConfig, channels: int, **memory: Any) -> None:
        super().__init__()
        self.squeeze = Squeeze(2)
        numbers = (config.scale_bias, config.scale_eps, config.scale_clamp)
        steps = [
            FlowStep(
                channels,
                hidden=config.hidden,
                coupling=CouplingSpec(config.coupling, config.scale_map, *numbers, factor=config.scale_factor),
                permutation=config.permutation,
                net_actnorm=config.net_actnorm,
                cond_channels=config.cond_channels,
                dims=config.dims,
                border=config.border,
            )
            for _ in range(config.n_steps)
        ]
        self.steps: ReversibleSequence | FrozenSteps = ReversibleSequence(steps, **memory)

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (N, C, *spatial) -> z (N, C 2^d, *spatial / 2), log_det (N,)."""
        cond = None if cond is None else fit_condition(cond, tuple(size // 2 for size in x.shape[2:]))
        return self.steps(x, cond, squeeze_first=True)

    def inverse(self, z: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        cond = None if cond is None else fit_condition(cond, tuple(z.shape[2:]))
        z, log_det = self.steps.inverse(z, cond)
        x, _ = self.squeeze.inverse(z)
        return x, log_det

    def initialize(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """Data-dependent initialisation, step after step, each from the output of those before it."""
        z, _ = self.squeeze(x)
        cond = None if cond is None else fit_condition(cond, tuple(z.shape[2:]))
        return self.steps.initialize(z, cond)
