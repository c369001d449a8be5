"""Joins runs of nflows' steps (mixing layers, then a coupling) into one chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nflows import transforms
from nflows.transforms.coupling import CouplingTransform
from torch import Tensor, nn

from pyglow_fast.interop import nets
from pyglow_fast.interop.indices import indices_on, undoing_indices_on
from pyglow_fast.interop.joined import ChangedError, Face, JoinedRun, JoinedStep, Place, unrepeatable
from pyglow_fast.interop.nflows.coupling import run_net
from pyglow_fast.interop.nflows.steps import StepParts, step_parts, waits_for_data
from pyglow_fast.interop.probing import chain_of
from pyglow_fast.reversible.steps import ChannelMap

STEPS = (transforms.AffineCouplingTransform,)  # what may be joined


class UserNet(nn.Module):
    """A net called as net(x, None), run by this package's executor as long as it knows the net's forward.

    Args:
        net: the net of a coupling, shared with it.
    """

    writes_to_input = False  # it gives its net a copy itself

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def halo(self) -> int | None:
        """How many positions to each side an output depends on; None where it is not known."""
        chain = chain_of(self.net, None)
        return nets.halo(self.net if chain is None else chain)

    @property
    def bytes_per_position(self) -> Callable[[int], int] | None:
        """A function that computes the bytes of activations of a position; None where they are not known."""
        return nets.bytes_per_position(self.net)

    @property
    def deterministic(self) -> bool | None:
        """True where the net's forward is known."""
        stated: bool | None = getattr(self.net, "deterministic", None)
        chain = chain_of(self.net, None)
        return True if chain is not None and isinstance(nets.recognised(chain), nets.KnownNet) else stated

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C/2, *spatial) to shift and raw scale (or shift alone)."""
        return run_net(self.net, x, None)


class StepRun(Face):
    """A run of joined steps, called as a Transform: ``forward`` is x -> z. With a context they run one by one.

    Args:
        modules, run: see Face.
        order: the order in which the run has the channels at its end; None if they are as in the library's.
    """

    def __init__(self, modules: Sequence[nn.Module], run: JoinedRun, order: Sequence[int] | None) -> None:
        super().__init__(modules, run)
        self.order = order

    def _joins(self, inputs: Tensor, context: Tensor | None) -> bool:
        return context is None and self.takes(inputs) and not any(waits_for_data(module) for module in self.modules)

    def __call__(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z, log_det (N,)."""

        def joined() -> tuple[Tensor, Tensor]:
            z, log_det = self.run.forward(inputs)
            return z if self.order is None else z[:, undoing_indices_on(self.order, z.device)], log_det

        return self.either(self._joins(inputs, context), joined, lambda: _cascade(self.modules, inputs, context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z to x and log_det (N,), through the steps in reverse."""

        def joined() -> tuple[Tensor, Tensor]:
            return self.run.inverse(inputs if self.order is None else inputs[:, indices_on(self.order, inputs.device)])

        inverses = [module.inverse for module in reversed(self.modules)]
        return self.either(self._joins(inputs, context), joined, lambda: _cascade(inverses, inputs, context))


def _cascade(calls: Sequence[Any], inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = transforms.CompositeTransform._cascade(inputs, calls, context)
    return found


def _channel_map(layers: Sequence[nn.Module], net: nn.Module, order: Sequence[int] | None) -> ChannelMap:
    """Compute the map of one step, its columns in the order in which the step before left the channels."""
    parts = step_parts(layers)
    if isinstance(parts, str) or parts.net is not net:
        raise ChangedError(parts if isinstance(parts, str) else "another net")
    matrix, source = parts.matrix, parts.source
    if order is not None:
        if source is None:
            matrix = matrix[:, indices_on(order, matrix.device)]
        else:
            source = undoing_indices_on(order, matrix.device)[source]
    return ChannelMap(matrix, parts.offset, parts.log_det, source)


def _groups(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Layers up to and with each coupling; what follows the last one is a group of its own."""
    found: list[list[nn.Module]] = [[]]
    for module in modules:
        found[-1].append(module)
        if isinstance(module, CouplingTransform):
            found.append([])
    return [group for group in found if group]


def _halving(layers: Sequence[nn.Module], memory: str) -> StepParts | str:
    """The parts of a step that may be joined, or why it may not."""
    parts = step_parts(layers)
    if isinstance(parts, str):
        return parts
    if 2 * parts.kept != len(parts.matrix):
        return f"a mask that keeps {parts.kept} of {len(parts.matrix)} channels"
    return unrepeatable(parts.net, memory) or parts


def places(modules: Sequence[nn.Module], owner: nn.Module, memory: str) -> list[Place]:
    """Divide the layers of a list into steps, mixing layers up to a coupling, that are joined if widths agree."""
    if isinstance(owner, transforms.MultiscaleCompositeTransform):
        return [Place([module], reason="its flow splits after each of its transforms") for module in modules]
    found: list[Place] = []
    for group in _groups(modules):
        first = next((i for i in range(len(group)) if not isinstance(step_parts(group[i:]), str)), 0)
        parts = _halving(group[first:], memory)
        if isinstance(parts, str):
            found.append(Place(group, reason=parts))
            continue
        if first:
            found.append(Place(group[:first]))
        found.append(Place(group[first:], len(parts.matrix), parts))
    return found


def stand_ins(run: Sequence[Place], memory: str, budget: str | int) -> list[StepRun]:
    """Make what replaces a run: one StepRun."""
    order: list[int] | None = None
    steps = []
    for place in run:
        channel_map = partial(_channel_map, place.layers, place.parts.net, order)
        steps.append(JoinedStep(UserNet(place.parts.net), place.parts.spec, channel_map))
        order = None if place.parts.order is None else place.parts.order.tolist()
    layers = [layer for place in run for layer in place.layers]
    return [StepRun(layers, JoinedRun(run[0].takes, steps, None, memory, budget), order)]
