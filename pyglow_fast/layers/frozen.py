"""Flow steps for deployment: folded weights in buffers, nothing left to compute from parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast._core.errors import check_input, expect
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.reversible_sequence import ReversibleSequence
from pyglow_fast.nets.chain import Chain
from pyglow_fast.nets.net_shape import NetShape
from pyglow_fast.reference import COUPLING_NETS
from pyglow_fast.runs import choice
from pyglow_fast.runs.description import Element, Run
from pyglow_fast.runs.maps import ChannelMap, Map

WEIGHTS = ("w1", "b1", "w2", "b2", "w3", "b3")
MAPS, INVERSES = ("matrices", "offsets", "log_dets", "indices"), ("inverses", "offsets", "log_dets", "inverse_indices")


class FrozenNet(NetShape):
    """w3 * relu(w2 * relu(w1 * x + b1) + b2) + b3 with weights in buffers: a CouplingNet, folded.

    Shapes: as of the net it is made from.
    """

    def __init__(self, net: CouplingNet) -> None:
        super().__init__(net.in_channels, net.out_channels, net.hidden, net.cond_channels, net.dims, net.border)
        with torch.no_grad():
            for name, weight in zip(WEIGHTS, net.folded_weights(), strict=True):
                plain = weight.detach().clone(memory_format=torch.contiguous_format)  # files hold no other
                self.register_buffer(name, plain)

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and device of the net."""
        return self.get_buffer("w1")

    @property
    def weights(self) -> list[Tensor]:
        """List the weights and biases of the three convolutions: w1, b1, w2, b2, w3, b3."""
        return [getattr(self, name) for name in WEIGHTS]

    def chain(self, x: Tensor) -> Chain | None:
        """The net as a chain of layers, None where something else than its weights decides what it computes."""
        if not self.is_plain or self.border:
            return None
        return Chain(self.weights, (0.0, 0.0, 0.0), COUPLING_NETS[self.dims])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Predict shift and raw scale (of an additive coupling the shift alone) from x and cond."""
        return self.run_on(x, cond, self.weights)


def _frozen(coupling: Coupling) -> Coupling:
    """A copy with the net frozen, where that is a CouplingNet as it comes."""
    found = copy.deepcopy(coupling)
    if type(found.net) is CouplingNet and found.net.is_plain:
        found.net = FrozenNet(found.net)
    return found


class FrozenSteps(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum, of a run of FlowSteps: the same function, from folded buffers.

    Gradients flow to x and cond; there are no parameters but those of nets of your own, whose gradient is off. For them
    the inverse keeps what the memory mode of the steps says, or "reversible" of steps with a budget in bytes; the
    forward keeps everything.

    Args:
        steps: FlowSteps as they come, initialised.

    Shapes: x, z (N, C, *spatial); log_det (N,), nats.

    Raises:
        ValueError: other steps, or not initialised ones.

    Examples:
        >>> import torch
        >>> from pyglow_fast import FlowStep, ReversibleSequence
        >>> from pyglow_fast.layers import FrozenSteps
        >>> steps, x = ReversibleSequence([FlowStep(4, hidden=8) for _ in range(3)]), torch.randn(2, 4, 8, 8)
        >>> z = steps.initialize(x)
        >>> frozen = FrozenSteps(steps)
        >>> len(list(frozen.parameters())), torch.allclose(frozen(x)[0], z, atol=1e-5)
        (0, True)
    """

    def __init__(self, steps: ReversibleSequence) -> None:
        super().__init__()
        expect(steps.is_fused, "steps", "FlowSteps without overridden methods and hooks", type(steps[0]).__name__)
        own = steps.flow_steps()
        ready = all(step.is_initialized for step in own)
        expect(ready, "steps", "initialised actnorms (a training forward, or initialize)", "fresh ones")
        self.channels, self.memory_budget = own[0].channels, steps.memory_budget
        self.memory = steps.memory if isinstance(steps.memory, str) else "reversible"
        self.inverse_control = copy.deepcopy(steps.inverse_control)
        with torch.no_grad():
            run = Run.of(one for step in own for one in step.elements())
            maps = choice.folded(run)
            inverses, back = maps.inverse()
            self.register_buffer("matrices", maps.matrix)
            self.register_buffer("offsets", maps.offset)
            self.register_buffer("log_dets", maps.log_det)
            self.register_buffer("inverses", inverses)
            self.register_buffer("indices", maps.source)  # None, and not saved, where the maps are matrices
            self.register_buffer("inverse_indices", back)
        self.couplings = nn.ModuleList(_frozen(coupling) for step in own for coupling in step.couplings)
        self.requires_grad_(False)
        self.eval()

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and device of the steps."""
        return self.get_buffer("offsets")

    def _stacked(self, names: Sequence[str], end: int | None = None) -> list[Tensor]:
        """Buffers of the maps, or of those before the couplings alone, up to ``end``."""
        found = [self._buffers[name] for name in names]
        return [buffer[:end] for buffer in found if buffer is not None]

    def _run(self, squeezes: bool = False) -> Run:
        elements: list[Element] = []
        couplings = cast("list[Coupling]", list(self.couplings))
        for k, own in enumerate(zip(*(buffer.unbind() for buffer in self._stacked(MAPS)), strict=True)):
            elements.append(Map.of(ChannelMap(*own)))
            if k < len(couplings):
                elements.append(couplings[k].element(self.like.shape[1]))
        return Run.of(elements, squeezes=squeezes)

    def _made(self, name: str, make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        if name == choice.MAPS:
            return self._stacked(MAPS, len(self.couplings))
        known = self._stacked(INVERSES, None if name == choice.KNOWN else len(self.couplings))
        return [buffer.flip(0) for buffer in known]  # from the last one back, as a state meets them

    def forward(self, x: Tensor, cond: Tensor | None = None, squeeze_first: bool = False) -> tuple[Tensor, Tensor]:
        """Map x to z; with squeeze_first, x is squeezed as it is read."""
        if not squeeze_first:
            check_input("x", x, self.channels, self.like)
        return choice.through(self._run(squeeze_first), x, cond, budget=self.memory_budget, made=self._made)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, with minus the log-det of the forward direction."""
        check_input("z", z, self.channels, self.like)
        options: dict[str, Any] = {"mode": self.memory, "control": self.inverse_control}
        run = self._run().turned()
        return choice.through(run, z, cond, budget=self.memory_budget, made=self._made, **options)

    def train(self, mode: bool = True) -> FrozenSteps:
        """Stay in evaluation mode, as frozen steps always are."""
        return super().train(False)
