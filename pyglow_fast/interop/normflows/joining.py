"""Runs of GlowBlocks in one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyglow_fast.interop.joined import (
    ALONE,
    ChangedError,
    Face,
    JoinedRun,
    JoinedStep,
    OrderedNet,
    Reasons,
    unrepeatable,
)
from pyglow_fast.interop.normflows.glow import GlowBlock, flow_parts
from pyglow_fast.layers.flow_step import ChannelMap

STEPS = (GlowBlock,)  # what may be joined


class GlowRun(Face):
    """GlowBlocks joined, called as one of them: ``forward`` is z -> x, ``inverse`` x -> z."""

    def _joins(self, z: Tensor) -> bool:
        return self.takes(z) and all(not isinstance(block, GlowBlock) or block.is_initialized for block in self.modules)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        return self.either(self._joins(z), lambda: self.run.inverse(z), lambda: _one_by_one(self.modules, z))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z, log_det (N,)."""
        inverses = [block.inverse for block in reversed(self.modules)]
        return self.either(self._joins(z), lambda: self.run.forward(z), lambda: _one_by_one(inverses, z))


def _one_by_one(calls: Sequence[Any], z: Tensor) -> tuple[Tensor, Tensor]:
    z, total = calls[0](z)
    for call in calls[1:]:
        z, log_det = call(z)
        total = total + log_det
    return z, total


def _channel_map(block: nn.Module, net: nn.Module) -> ChannelMap:
    parts = flow_parts(block)
    if isinstance(parts, str) or parts.net is not net:
        raise ChangedError(parts if isinstance(parts, str) else "another net")
    return parts.channel_map


def _step(block: nn.Module, memory: str) -> tuple[int, JoinedStep] | str:
    """Channels and step of a block, or why it is none."""
    parts = flow_parts(block)
    if isinstance(parts, str):
        return parts
    if reason := unrepeatable(parts.net, memory):
        return reason
    channels = parts.channel_map.matrix.shape[0]
    if 2 * parts.kept != channels:
        return f"an odd number of channels, {channels}"
    return channels, JoinedStep(OrderedNet(parts.net, parts.order), parts.spec, partial(_channel_map, block, parts.net))


def join(modules: Sequence[nn.Module], owner: nn.Module, memory: str, budget: str | int) -> tuple[list[Any], Reasons]:
    """The modules, with a GlowRun in the place of every run of two or more GlowBlocks of one width.

    And why those GlowBlocks are not in one that are in none.
    """
    found: list[Any] = []
    reasons: Reasons = {}
    run: list[tuple[nn.Module, int, JoinedStep]] = []

    def close() -> None:
        if len(run) > 1:
            # From x to z the last block of the list is the first.
            steps = [step for _, _, step in reversed(run)]
            found.append(GlowRun([block for block, _, _ in run], JoinedRun(run[0][1], steps, None, memory, budget)))
        else:
            found.extend(block for block, _, _ in run)
            reasons.update((block, ALONE) for block, _, _ in run)
        run.clear()

    for module in modules:
        step = _step(module, memory) if isinstance(module, GlowBlock) else ""
        if isinstance(step, str) or (run and run[0][1] != step[0]):
            close()
        if isinstance(step, str):
            found.append(module)
            reasons |= {module: step} if step else {}
        else:
            run.append((module, *step))
    close()
    return found, reasons
