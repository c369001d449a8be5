"""Flow steps for deployment: folded weights in buffers, nothing left to compute from parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._errors import check_input, expect
from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets.net_shape import NetShape
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import ChannelMap, run_couplings, run_couplings_inverse
from pyglow_fast.layers.folded import FoldedSteps, is_foldable
from pyglow_fast.layers.reversible_sequence import ReversibleSequence

WEIGHTS = ("w1", "b1", "w2", "b2", "w3", "b3")


class FrozenNet(NetShape):
    """w3 * relu(w2 * relu(w1 * x + b1) + b2) + b3 with weights in buffers: a CouplingNet, folded.

    Shapes: as of the net it is made from.
    """

    def __init__(self, net: CouplingNet) -> None:
        super().__init__(net.in_channels, net.out_channels, net.hidden, net.cond_channels, net.dims, net.border)
        with torch.no_grad():
            for name, weight in zip(WEIGHTS, net.folded_weights(), strict=True):
                self.register_buffer(name, weight.detach().clone())

    @property
    def like(self) -> Tensor:
        """A tensor of the net's dtype and device."""
        weight: Tensor = self.get_buffer("w1")
        return weight

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """x, cond -> shift and raw scale (or shift alone)."""
        weights = [self.get_buffer(name) for name in WEIGHTS]
        return self.run_on(x, cond, weights)


class FrozenSteps(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum, of a run of FlowSteps: the same function, from folded buffers.

    Gradients flow to x and cond; there are no parameters but those of nets of your own, whose gradient is off.

    Args:
        steps: FlowSteps as they come, initialised.

    Shapes: x, z (N, C, *spatial); log_det (N,), nats.

    Raises:
        ValueError: other steps, or not initialised ones.
    """

    def __init__(self, steps: ReversibleSequence) -> None:
        super().__init__()
        expect(steps.is_fused, "steps", "FlowSteps without overridden methods and hooks", type(steps[0]).__name__)
        own = steps.flow_steps()
        ready = all(step.is_initialized for step in own)
        expect(ready, "steps", "initialised actnorms (a training forward, or initialize)", "fresh ones")
        self.channels, self.memory_budget = own[0].channels, steps.memory_budget
        folded = FoldedSteps.of(own)
        with torch.no_grad():
            self.register_buffer("matrices", torch.stack([part.matrix for part in folded.maps]))
            self.register_buffer("offsets", torch.stack([part.offset for part in folded.maps]))
            self.register_buffer("log_dets", torch.stack([part.log_det for part in folded.maps]))
            self.register_buffer("inverses", torch.stack(folded.inverses))
        couplings = []
        for step in own:
            net = FrozenNet(step.coupling.net) if is_foldable(step.coupling.net) else step.coupling.net  # type: ignore[arg-type]
            couplings.append(Coupling(net, *step.coupling.spec, step.coupling.precision))
        self.couplings = nn.ModuleList(couplings)
        self.requires_grad_(False)
        self.eval()

    def _folded(self) -> FoldedSteps:
        parts: list[Any] = [self.get_buffer(name).unbind() for name in ("matrices", "offsets", "log_dets", "inverses")]
        maps = [ChannelMap(*values) for values in zip(*parts[:3], strict=True)]
        return FoldedSteps(maps, [None] * len(maps), list(parts[3]))

    def _budget(self) -> str | int | None:
        whole = torch.is_grad_enabled() or is_watched()
        return None if whole else self.memory_budget

    def forward(self, x: Tensor, cond: Tensor | None = None, squeeze_first: bool = False) -> tuple[Tensor, Tensor]:
        """x -> z; with squeeze_first, x is squeezed as it is read."""
        if not squeeze_first:
            check_input("x", x, self.channels, self.get_buffer("offsets"))
        return run_couplings(list(self.couplings), self._folded(), x, cond, squeeze_first, self._budget())  # type: ignore[arg-type]

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x."""
        check_input("z", z, self.channels, self.get_buffer("offsets"))
        return run_couplings_inverse(list(self.couplings), self._folded(), z, cond, self._budget())  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> FrozenSteps:
        """Stays in evaluation mode."""
        return super().train(False)
