"""Runs of nflows' steps (mixing layers, then a coupling) in one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from nflows import transforms
from nflows.transforms.coupling import CouplingTransform
from torch import Tensor, nn

from pyglow_fast.interop.joined import Face, JoinedRun, JoinedStep, OrderedNet
from pyglow_fast.interop.nflows.steps import step_parts, waits_for_data
from pyglow_fast.interop.probing import chain_of
from pyglow_fast.layers.flow_step import ChannelMap


class StepRun(Face):
    """Steps joined, called as a Transform: ``forward`` is x -> z. With a context they run one by one.

    Args:
        modules, run: see Face.
        order: in which the run has the channels at its end, None for as they are.
    """

    def __init__(self, modules: Sequence[nn.Module], run: JoinedRun, order: Tensor | None) -> None:
        super().__init__(modules, run)
        self.order = order

    def _alone(self, context: Tensor | None) -> bool:
        return context is not None or any(waits_for_data(module) for module in self.modules)

    def __call__(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> z, log_det (N,)."""
        if self._alone(context):
            return transforms.CompositeTransform._cascade(inputs, self.modules, context)
        z, log_det = self.run.forward(inputs)
        return z if self.order is None else z[:, self.order.argsort().to(z.device)], log_det

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        if self._alone(context):
            inverses = [module.inverse for module in reversed(self.modules)]
            return transforms.CompositeTransform._cascade(inputs, inverses, context)
        z = inputs if self.order is None else inputs[:, self.order.to(inputs.device)]
        return self.run.inverse(z)


def _channel_map(layers: Sequence[nn.Module], order: Tensor | None) -> ChannelMap:
    """Of one step, its columns in the order in which the step before left the channels."""
    parts = step_parts(layers)
    if isinstance(parts, str):
        raise RuntimeError(f"a joined step has changed: {parts}; undo the acceleration before such changes")
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


def join(modules: Sequence[nn.Module], memory: str, budget: str | int) -> list[Any]:
    """The modules, with a StepRun in the place of every run of two or more halving steps of one width."""
    found: list[Any] = []
    run: list[list[nn.Module]] = []
    state: dict[str, Any] = {"channels": 0, "order": None, "steps": []}

    def close() -> None:
        if len(run) > 1:
            layers = [layer for group in run for layer in group]
            joined = JoinedRun(state["channels"], state["steps"], None, memory, budget)
            found.append(StepRun(layers, joined, state["order"]))
        else:
            found.extend(layer for group in run for layer in group)
        run.clear()
        state.update(channels=0, order=None, steps=[])

    for group in _groups(modules):
        first = next((i for i in range(len(group)) if not isinstance(step_parts(group[i:]), str)), None)
        parts = "" if first is None else step_parts(group[first:])
        if isinstance(parts, str) or 2 * parts.kept != len(parts.matrix):
            close()
            found.extend(group)
            continue
        if first or state["channels"] != len(parts.matrix):  # something before the step, or another width
            close()
            found.extend(group[:first])
            state["channels"] = len(parts.matrix)
        layers = group[first:]
        channel_map = partial(_channel_map, layers, state["order"])
        chain = chain_of(parts.net, None)
        net = OrderedNet(parts.net, extra=(None,)) if chain is None else OrderedNet(chain)
        state["steps"].append(JoinedStep(net, parts.spec, channel_map))
        state["order"] = None if parts.order is None else torch.as_tensor(parts.order).clone()
        run.append(layers)
    close()
    return found
