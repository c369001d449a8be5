"""Flow steps for deployment: folded weights in buffers, nothing left to compute from parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyglow_fast._errors import check_input, expect
from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets.net_shape import NetShape
from pyglow_fast.coupling_nets.traits import is_altered
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import (
    ChannelMap,
    couplings_of,
    run_couplings,
    run_couplings_inverse,
    stack_maps,
    unstack_maps,
)
from pyglow_fast.layers.folded import FoldedSteps, is_foldable
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.kept_values import KeptTensors, has_version
from pyglow_fast.layers.reversible_sequence import ReversibleSequence
from pyglow_fast.reversible.maps import MapInverse

WEIGHTS = ("w1", "b1", "w2", "b2", "w3", "b3")
BUFFERS = ("matrices", "offsets", "log_dets", "indices", "inverses", "inverse_indices")


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
        weight: Tensor = self.w1  # type: ignore[assignment]
        return weight

    @property
    def weights(self) -> list[Tensor]:
        """List the weights and biases of the three convolutions: w1, b1, w2, b2, w3, b3."""
        return [getattr(self, name) for name in WEIGHTS]

    @property
    def is_plain(self) -> bool:
        """Whether its weights alone decide what it computes: no subclass, hook or parametrization has a part in it."""
        own = type(self) is FrozenNet and not is_altered(self)
        return own and not torch.nn.modules.module._has_any_global_hook()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Predict shift and raw scale (of an additive coupling the shift alone) from x and cond."""
        return self.run_on(x, cond, self.weights)


def _frozen(coupling: Coupling) -> Coupling:
    """The same with the net frozen, where that is a CouplingNet as it comes."""
    net = FrozenNet(coupling.net) if is_foldable(coupling.net) else coupling.net  # type: ignore[arg-type]
    if isinstance(coupling, AffineInjector):
        return AffineInjector(coupling.channels, net=net, spec=coupling.spec, precision=coupling.precision)
    parity = 0 if coupling.board is None else coupling.board.parity
    return Coupling(net, *coupling.spec, coupling.precision, coupling.mask, parity)


class _Views:
    """The maps of single steps and their inverses, as views of the buffers that they are stacked in."""

    def __init__(self) -> None:
        self._kept: tuple[KeptTensors, list[ChannelMap], list[MapInverse]] | None = None

    def __reduce__(self) -> tuple[type[_Views], tuple[()]]:
        """A copy of the steps has buffers of its own."""
        return _Views, ()

    def of(self, buffers: Sequence[Tensor | None]) -> tuple[list[ChannelMap], list[MapInverse]]:
        """Take the buffers apart; the same views as before where these are the same, and nothing is recorded."""
        tensors = [tensor for tensor in buffers if tensor is not None]
        if torch.is_grad_enabled() or is_watched() or not all(map(has_version, tensors)):
            return self._taken_apart(buffers)
        kept = self._kept
        if kept is None or not kept[0].same(tensors):
            kept = self._kept = KeptTensors(tensors, by_version=True), *self._taken_apart(buffers)
        return kept[1:]

    @staticmethod
    def _taken_apart(buffers: Sequence[Tensor | None]) -> tuple[list[ChannelMap], list[MapInverse]]:
        *stacked, inverses, back = buffers
        maps = unstack_maps(ChannelMap(*stacked))  # type: ignore[arg-type]
        assert inverses is not None  # that of the gathers' indices alone may be
        indices = [None] * len(maps) if back is None else back.unbind()
        return maps, list(zip(inverses, indices, strict=True))


class FrozenSteps(FlowLayer):
    """z = f_K(... f_1(x)), log_det their sum, of a run of FlowSteps: the same function, from folded buffers.

    Gradients flow to x and cond; there are no parameters but those of nets of your own, whose gradient is off.

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
        folded = FoldedSteps.of(own)
        with torch.no_grad():
            maps = stack_maps(folded.maps)
            inverses, back = maps.inverse()
            self.register_buffer("matrices", maps.matrix)
            self.register_buffer("offsets", maps.offset)
            self.register_buffer("log_dets", maps.log_det)
            self.register_buffer("inverses", inverses)
            self.register_buffer("indices", maps.source)  # None, and not saved, where the maps are matrices
            self.register_buffer("inverse_indices", back)
        self.couplings = nn.ModuleList(map(_frozen, couplings_of(own)))
        self.requires_grad_(False)
        self.eval()
        self._views = _Views()

    def _folded(self) -> FoldedSteps:
        maps, inverses = self._views.of([self._buffers[name] for name in BUFFERS])
        nets = [coupling.net for coupling in self.couplings]
        plain = [net.weights if isinstance(net, FrozenNet) and net.is_plain else None for net in nets]
        return FoldedSteps(maps, plain, inverses)

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and device of the steps."""
        return self.get_buffer("offsets")

    def _budget(self) -> str | int | None:
        whole = torch.is_grad_enabled() or is_watched()
        return None if whole else self.memory_budget

    def forward(self, x: Tensor, cond: Tensor | None = None, squeeze_first: bool = False) -> tuple[Tensor, Tensor]:
        """Map x to z; with squeeze_first, x is squeezed as it is read."""
        if not squeeze_first:
            check_input("x", x, self.channels, self.like)
        return run_couplings(list(self.couplings), self._folded(), x, cond, squeeze_first, self._budget())  # type: ignore[arg-type]

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, with minus the log-det of the forward direction."""
        check_input("z", z, self.channels, self.like)
        return run_couplings_inverse(list(self.couplings), self._folded(), z, cond, self._budget())  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> FrozenSteps:
        """Do nothing: frozen steps stay in evaluation mode."""
        return super().train(False)
