"""One level of a Glow: its squeeze and its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.layers import FlowStep, FrozenSteps, ReversibleSequence
from pyglow_fast.layers.flow_step import NO_COUPLING
from pyglow_fast.models.condition import fitted
from pyglow_fast.models.config import GlowConfig
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.runs.planner import RunPlan

Steps = ReversibleSequence | FrozenSteps
NetFactory = Callable[[int, int], nn.Module]  # net(in_channels, out_channels), called once for each coupling


class FlowLevel(nn.Module):
    """One level: steps with checkerboard masks, if any, then a squeeze and steps with channel masks, if any.

    Among the steps with channel masks those without a coupling come first.

    Args:
        config: of the whole model.
        level: which one, from 0.
        net: makes the coupling nets; None: they are CouplingNets, as the config says.
        memory: options of the ReversibleSequences.
    """

    def __init__(self, config: GlowConfig, level: int, net: NetFactory | None, *memory: Any) -> None:
        super().__init__()
        squeezes, channels = config.squeezes(level), config.level_shapes()[level][0]
        n_boards = config.n_checkerboard if squeezes else config.n_last_checkerboard
        width = channels // 2**config.dims if squeezes else channels
        # Dinh et al. 2017, figure 3: the first mask keeps where the sum of the indices is odd.
        boards = [_step(config, level, width, net, mask="checkerboard", parity=(k + 1) % 2) for k in range(n_boards)]
        self.checkerboard: Steps | None = ReversibleSequence(boards, *memory) if boards else None
        steps: list[FlowStep] = []
        if squeezes:
            for _ in range(config.n_transitions):
                steps.append(FlowStep(channels, coupling=NO_COUPLING, permutation=config.permutation))
            steps += [_step(config, level, channels, net) for _ in range(config.n_steps - n_boards)]
        self.steps: Steps | None = ReversibleSequence(steps, *memory) if steps else None

    def freeze(self) -> None:
        """Replace all steps by their folded ones; see FrozenSteps."""
        for name, steps in (("checkerboard", self.checkerboard), ("steps", self.steps)):
            if isinstance(steps, ReversibleSequence):
                setattr(self, name, FrozenSteps(steps))

    @property
    def has_begun(self) -> bool:
        """Whether the actnorm of the level's first step has been initialised."""
        steps: Any = self.checkerboard or self.steps
        return isinstance(steps, FrozenSteps) or bool(steps[0].is_initialized)

    def named_runs(self) -> list[tuple[str, Steps, bool]]:
        """List the runs of steps that there are by name, in their order, and whether a squeeze comes before them."""
        runs = (("checkerboard", self.checkerboard, False), ("steps", self.steps, True))
        return [(name, steps, squeezes) for name, steps, squeezes in runs if steps is not None]

    def forward(
        self, x: Tensor, cond: Tensor | None, plans: Mapping[nn.Module, RunPlan], at: Sequence[int] = ()
    ) -> tuple[list[Tensor], Tensor]:
        """Map x (N, C, *spatial) to the states behind the steps ``at`` and behind the last one, and log_det (N,).

        A state is (N, C 2^d, *spatial / 2), unless the level has no squeeze. ``plans`` are of runs of steps, the
        others do what their memory mode says; ``at`` is empty for a frozen level, or one with checkerboards.
        """
        log_dets, states = [], [x]
        for _, steps, squeezes in self.named_runs():
            own = None if cond is None else fitted(cond, [size // (1 + squeezes) for size in x.shape[2:]])
            planned = {"plan": plans[steps]} if steps in plans else {}
            if at:
                assert isinstance(steps, ReversibleSequence)
                states, log_det = steps.intermediates(x, own, at, squeezes, **planned)
            else:
                x, log_det = steps(x, own, squeezes, **planned)
                states = [x]
            log_dets.append(log_det)
        return states, functional.summed(log_dets)

    def inverse(self, z: Tensor, cond: Tensor | None, plans: Mapping[nn.Module, RunPlan]) -> tuple[Tensor, Tensor]:
        """Map z back to x; log_det (N,) is the negative of the forward one. Plans as of :meth:`forward`."""
        log_dets = []
        for _, steps, squeezes in reversed(self.named_runs()):
            planned = {"plan": plans[steps]} if steps in plans else {}
            z, log_det = steps.inverse(z, fitted(cond, z.shape[2:]), **planned)
            z = functional.unsqueeze(z) if squeezes else z
            log_dets.append(log_det)
        return z, functional.summed(log_dets)

    def initialize(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """Initialise step after step from data, each from the output of those before it."""
        for _, steps, squeezes in self.named_runs():
            x = functional.squeeze(x) if squeezes else x
            x = steps.initialize(x, fitted(cond, x.shape[2:]))
        return x


def _step(
    config: GlowConfig, level: int, channels: int, factory: NetFactory | None, mask: str = "channels", parity: int = 0
) -> FlowStep:
    numbers = (config.scale_bias, config.scale_eps, config.scale_clamp)
    return FlowStep(
        channels,
        hidden=config.hidden,
        coupling=CouplingSpec(config.coupling, config.scale_map, *numbers, factor=config.scale_factor),
        permutation=config.permutation,
        net=factory,
        net_actnorm=config.net_actnorm,
        cond_channels=config.cond_channels_of(level),
        dims=config.dims,
        border=config.border,
        injector=config.injector,
        mask=mask,
        parity=parity,
    )
