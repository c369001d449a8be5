"""Runs of FrEIA's AllInOneBlocks in one chain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyglow_fast.interop.freia.all_in_one import AllInOneBlock, step_parts
from pyglow_fast.interop.joined import Face, JoinedRun, JoinedStep, after
from pyglow_fast.layers.flow_step import ChannelMap


class BlockRun(Face):
    """AllInOneBlocks joined, called as one of them, without conditions."""

    def __call__(
        self, x: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """(x,) -> (z,), log_det (N,); with ``rev`` (z,) -> (x,)."""
        out, log_det = self.run.inverse(x[0]) if rev else self.run.forward(x[0])
        return (out,), log_det


def _between(before: nn.Module | None, block: nn.Module | None) -> ChannelMap:
    """What is between the couplings of two blocks that follow each other; of one alone, its end or its beginning."""
    end = None if before is None else step_parts(before).after
    begin = None if block is None else step_parts(block).before
    if end is None or begin is None:
        found = begin if end is None else end
        assert found is not None
        return found
    return after(end, begin)


def _joins(module: nn.Module) -> bool:
    return (
        type(module) is AllInOneBlock
        and not module.conditional
        and module.splits[0] == module.splits[1]
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    )


def join(modules: Sequence[nn.Module], memory: str, budget: str | int) -> list[Any]:
    """The modules, with a BlockRun in the place of every run of two or more blocks of one width without conditions."""
    found: list[Any] = []
    run: list[Any] = []

    def close() -> None:
        if len(run) > 1:
            steps = []
            for previous, block in zip([None, *run[:-1]], run, strict=True):
                parts = step_parts(block)
                mixes = previous is not None or parts.before is not None
                channel_map = partial(_between, previous, block) if mixes else None
                steps.append(JoinedStep(parts.net, parts.spec, channel_map))
            last = partial(_between, run[-1], None)
            found.append(BlockRun(run, JoinedRun(run[0].in_channels, steps, last, memory, budget)))
        else:
            found.extend(run)
        run.clear()

    for module in modules:
        joins = _joins(module)
        if not joins or (run and run[0].in_channels != module.in_channels):
            close()
        if joins:
            run.append(module)
        else:
            found.append(module)
    close()
    return found
