"""Runs of GlowBlocks in one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyglow_fast.interop.joined import Face, JoinedRun, JoinedStep, OrderedNet
from pyglow_fast.interop.normflows.glow import GlowBlock, flow_parts
from pyglow_fast.layers.flow_step import ChannelMap


class GlowRun(Face):
    """GlowBlocks joined, called as one of them: ``forward`` is z -> x, ``inverse`` x -> z."""

    def _waits(self) -> bool:
        return any(isinstance(block, GlowBlock) and not block.is_initialized for block in self.modules)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z -> x, log_det (N,)."""
        if self._waits():
            return _one_by_one(self.modules, z, "forward")
        return self.run.inverse(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z, log_det (N,)."""
        if self._waits():
            return _one_by_one(self.modules[::-1], z, "inverse")
        return self.run.forward(z)


def _one_by_one(blocks: Sequence[Any], z: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    total = z.new_zeros(z.shape[0])
    for block in blocks:
        z, log_det = getattr(block, direction)(z)
        total = total + log_det
    return z, total


def _channel_map(block: nn.Module) -> ChannelMap:
    parts = flow_parts(block)
    if isinstance(parts, str):
        raise RuntimeError(f"a joined GlowBlock has changed: {parts}; undo the acceleration before such changes")
    return parts.channel_map


def _step(block: nn.Module) -> tuple[int, JoinedStep] | str:
    """Channels and step of a block, or why it is none."""
    parts = flow_parts(block)
    if isinstance(parts, str):
        return parts
    channels = parts.channel_map.matrix.shape[0]
    if 2 * parts.kept != channels:
        return f"an odd number of channels, {channels}"
    return channels, JoinedStep(OrderedNet(parts.net, parts.order), parts.spec, partial(_channel_map, block))


def join(modules: Sequence[nn.Module], memory: str, budget: str | int) -> list[Any]:
    """The modules, with a GlowRun in the place of every run of two or more GlowBlocks of one width."""
    found: list[Any] = []
    run: list[tuple[nn.Module, int, JoinedStep]] = []

    def close() -> None:
        if len(run) > 1:
            # From x to z the last block of the list is the first.
            steps = [step for _, _, step in reversed(run)]
            found.append(GlowRun([block for block, _, _ in run], JoinedRun(run[0][1], steps, None, memory, budget)))
        else:
            found.extend(block for block, _, _ in run)
        run.clear()

    for module in modules:
        step = _step(module) if isinstance(module, GlowBlock) else ""
        if isinstance(step, str) or (run and run[0][1] != step[0]):
            close()
        if isinstance(step, str):
            found.append(module)
        else:
            run.append((module, *step))
    close()
    return found
