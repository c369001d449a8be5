"""Joins runs of GlowBlocks into one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyglow_fast.interop.joined import (
    ChangedError,
    Face,
    JoinedRun,
    JoinedStep,
    OrderedNet,
    Place,
    unrepeatable,
)
from pyglow_fast.interop.normflows.glow import GlowBlock, flow_parts
from pyglow_fast.reversible.steps import ChannelMap

STEPS = (GlowBlock,)  # what may be joined


class GlowRun(Face):
    """A run of joined GlowBlocks, called as one of them: ``forward`` is z -> x, ``inverse`` x -> z."""

    def _joins(self, z: Tensor) -> bool:
        return self.takes(z) and all(not isinstance(block, GlowBlock) or block.is_initialized for block in self.modules)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        return self.either(self._joins(z), lambda: self.run.inverse(z), lambda: _one_by_one(self.modules, z))

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to z and log_det (N,), through all blocks."""
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


def _place(block: nn.Module, memory: str) -> Place:
    parts = flow_parts(block)
    if isinstance(parts, str):
        return Place([block], reason=parts)
    channels = parts.channel_map.matrix.shape[0]
    reason = unrepeatable(parts.net, memory)
    if reason or 2 * parts.kept != channels:
        return Place([block], reason=reason or f"an odd number of channels, {channels}")
    step = JoinedStep(OrderedNet(parts.net, parts.order), parts.spec, partial(_channel_map, block, parts.net))
    return Place([block], channels, step)


def places(modules: Sequence[nn.Module], owner: nn.Module, memory: str) -> list[Place]:
    """Divide the modules of a list into GlowBlocks, which are joined if their widths agree, and others."""
    return [_place(module, memory) for module in modules]


def stand_ins(run: Sequence[Place], memory: str, budget: str | int) -> list[GlowRun]:
    """Make what replaces a run: one GlowRun."""
    steps = [place.parts for place in reversed(run)]  # from x to z the last block of the list is the first
    blocks = [block for place in run for block in place.layers]
    return [GlowRun(blocks, JoinedRun(run[0].takes, steps, None, memory, budget))]
