"""Runs of nflows' steps (mixing layers, then a coupling) in one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from nflows import transforms
from nflows.transforms.coupling import CouplingTransform
from torch import Tensor, nn

from pyglow_fast.interop.joined import ALONE, ChangedError, Face, JoinedRun, JoinedStep, Reasons, unrepeatable
from pyglow_fast.interop.nets import KnownNet, recognised
from pyglow_fast.interop.nflows.coupling import run_net
from pyglow_fast.interop.nflows.steps import step_parts, waits_for_data
from pyglow_fast.interop.probing import chain_of
from pyglow_fast.layers.flow_step import ChannelMap

STEPS = (transforms.AffineCouplingTransform,)  # what may be joined


class UserNet(nn.Module):
    """net(x, None), by our executor as long as the net's forward is one that it knows, which is asked each time.

    Args:
        net: of a coupling, shared with it.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def halo(self) -> int | None:
        """Positions to each side that an output depends on, None where it is not known."""
        stated: int | None = getattr(self.net, "halo", None)
        return 2 if isinstance(self._known(), KnownNet) else stated

    @property
    def deterministic(self) -> bool | None:
        """True where it is known."""
        stated: bool | None = getattr(self.net, "deterministic", None)
        return True if isinstance(self._known(), KnownNet) else stated

    def _known(self) -> KnownNet | str:
        chain = chain_of(self.net, None)
        return "" if chain is None else recognised(chain)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C/2, *spatial) -> shift and raw scale (or shift alone)."""
        return run_net(self.net, x, None)


class StepRun(Face):
    """Steps joined, called as a Transform: ``forward`` is x -> z. With a context they run one by one.

    Args:
        modules, run: see Face.
        order: in which the run has the channels at its end, None for as they are.
    """

    def __init__(self, modules: Sequence[nn.Module], run: JoinedRun, order: Tensor | None) -> None:
        super().__init__(modules, run)
        self.order = order

    def _joins(self, inputs: Tensor, context: Tensor | None) -> bool:
        return context is None and self.takes(inputs) and not any(waits_for_data(module) for module in self.modules)

    def __call__(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z, log_det (N,)."""

        def joined() -> tuple[Tensor, Tensor]:
            z, log_det = self.run.forward(inputs)
            return z if self.order is None else z[:, self.order.argsort().to(z.device)], log_det

        return self.either(self._joins(inputs, context), joined, lambda: _cascade(self.modules, inputs, context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""

        def joined() -> tuple[Tensor, Tensor]:
            return self.run.inverse(inputs if self.order is None else inputs[:, self.order.to(inputs.device)])

        inverses = [module.inverse for module in reversed(self.modules)]
        return self.either(self._joins(inputs, context), joined, lambda: _cascade(inverses, inputs, context))


def _cascade(calls: Sequence[Any], inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = transforms.CompositeTransform._cascade(inputs, calls, context)
    return found


def _channel_map(layers: Sequence[nn.Module], net: nn.Module, order: Tensor | None) -> ChannelMap:
    """Of one step, its columns in the order in which the step before left the channels."""
    parts = step_parts(layers)
    if isinstance(parts, str) or parts.net is not net:
        raise ChangedError(parts if isinstance(parts, str) else "another net")
    matrix = parts.matrix if order is None else parts.matrix[:, order.to(parts.matrix.device)]
    return ChannelMap(matrix, parts.offset, parts.log_det)


def _groups(modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Layers up to and with each coupling; what follows the last one is a group of its own."""
    found: list[list[nn.Module]] = [[]]
    for module in modules:
        found[-1].append(module)
        if isinstance(module, CouplingTransform):
            found.append([])
    return [group for group in found if group]


def join(modules: Sequence[nn.Module], owner: nn.Module, memory: str, budget: str | int) -> tuple[list[Any], Reasons]:
    """The modules, with a StepRun in the place of every run of two or more halving steps of one width.

    And why those couplings are not in one that are in none.
    """
    if isinstance(owner, transforms.MultiscaleCompositeTransform):
        return list(modules), dict.fromkeys(modules, "its flow splits after each of its transforms")
    found: list[Any] = []
    reasons: Reasons = {}
    run: list[list[nn.Module]] = []
    state: dict[str, Any] = {"channels": 0, "order": None, "steps": []}

    def close() -> None:
        if len(run) > 1:
            layers = [layer for group in run for layer in group]
            joined = JoinedRun(state["channels"], state["steps"], None, memory, budget)
            found.append(StepRun(layers, joined, state["order"]))
        else:
            found.extend(layer for group in run for layer in group)
            reasons.update((group[-1], ALONE) for group in run)
        run.clear()
        state.update(channels=0, order=None, steps=[])

    for group in _groups(modules):
        first = next((i for i in range(len(group)) if not isinstance(step_parts(group[i:]), str)), None)
        parts = step_parts(group if first is None else group[first:])
        if not isinstance(parts, str):
            uneven = f"a mask that keeps {parts.kept} of {len(parts.matrix)} channels"
            reason = uneven if 2 * parts.kept != len(parts.matrix) else unrepeatable(parts.net, memory)
            parts = reason or parts
        if isinstance(parts, str):
            close()
            found.extend(group)
            if isinstance(group[-1], CouplingTransform):
                reasons[group[-1]] = parts
            continue
        if first or state["channels"] != len(parts.matrix):  # something before the step, or another width
            close()
            found.extend(group[:first])
            state["channels"] = len(parts.matrix)
        layers = group[first:]
        channel_map = partial(_channel_map, layers, parts.net, state["order"])
        state["steps"].append(JoinedStep(UserNet(parts.net), parts.spec, channel_map))
        state["order"] = None if parts.order is None else torch.as_tensor(parts.order).clone()
        run.append(layers)
    close()
    return found, reasons
