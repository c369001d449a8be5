"""One level of a Glow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pyglow_fast.layers import FlowStep, FrozenSteps, ReversibleSequence, Squeeze
from pyglow_fast.layers.flow_step import NO_COUPLING
from pyglow_fast.models.config import GlowConfig
from pyglow_fast.reference import CouplingSpec


class FlowLevel(nn.Module):
    """One level: squeeze, then its flow steps, those without a coupling first; parameter work is done in one batch."""

    def __init__(self, config: GlowConfig, level: int, channels: int, **memory: Any) -> None:
        super().__init__()
        self.squeeze = Squeeze(2)
        numbers = (config.scale_bias, config.scale_eps, config.scale_clamp)
        steps = [
            FlowStep(channels, coupling=NO_COUPLING, permutation=config.permutation)
            for _ in range(config.n_transitions)
        ]
        steps += [
            FlowStep(
                channels,
                hidden=config.hidden,
                coupling=CouplingSpec(config.coupling, config.scale_map, *numbers),
                permutation=config.permutation,
                net_actnorm=config.net_actnorm,
                cond_channels=config.cond_channels_of(level),
                dims=config.dims,
                border=config.border,
                injector=config.injector,
            )
            for _ in range(config.n_steps)
        ]
        self.steps: ReversibleSequence | FrozenSteps = ReversibleSequence(steps, **memory)

    def forward(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (N, C, *spatial), cond (N, C_cond, *spatial / 2) -> z (N, C 2^d, *spatial / 2), log_det (N,)."""
        return self.steps(x, cond, squeeze_first=True)

    def intermediates(self, x: Tensor, cond: Tensor | None, at: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """x -> the states behind the steps ``at`` and behind the last one, log_det (N,); not of a frozen level."""
        assert isinstance(self.steps, ReversibleSequence)
        return self.steps.intermediates(x, cond, at, squeeze_first=True)

    def inverse(self, z: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        z, log_det = self.steps.inverse(z, cond)
        x, _ = self.squeeze.inverse(z)
        return x, log_det

    def initialize(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """Data-dependent initialisation, step after step, each from the output of those before it."""
        z, _ = self.squeeze(x)
        return self.steps.initialize(z, cond)
