"""Joins runs of AllInOneBlocks, of lists and of graphs, into one chain each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.freia.all_in_one import ServedBlock, step_parts
from pyglow_fast.interop.freia.layout import side_by_side
from pyglow_fast.interop.joined import (
    ChangedError,
    Face,
    JoinedRun,
    JoinedStep,
    Place,
    unrepeatable,
)
from pyglow_fast.layers.flow_step import after
from pyglow_fast.reversible.steps import ChannelMap

STEPS = (ServedBlock,)  # what may be joined


class BlockRun(Face):
    """A run of joined AllInOneBlocks, called as one of them, with the same conditions for all or none."""

    def takes(self, x: Tensor) -> bool:
        """Whether the run takes x; a size that the blocks refuse they refuse themselves."""
        first: Any = self.modules[0]
        sized = not first._fixed_size or tuple(x.shape[1:]) == tuple(first.dims_in[0])
        return sized and super().takes(x)

    def __call__(
        self, x: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """(x,) -> (z,), log_det (N,); with ``rev`` (z,) -> (x,)."""
        cond = side_by_side(c or ())

        def joined() -> tuple[tuple[Tensor], Tensor]:
            out, log_det = (self.run.inverse if rev else self.run.forward)(x[0], cond)
            return (out,), log_det

        def alone() -> tuple[tuple[Tensor], Tensor]:
            given = {"c": c} if c else {}
            state, total = x, 0
            for block in reversed(self.modules) if rev else self.modules:
                state, log_det = block(state, rev=rev, jac=jac, **given)
                total = log_det + total
            return (state[0],), cast(Tensor, total)

        joins = self.takes(x[0])
        if joins and not self.spares:
            blocks: Sequence[Any] = self.modules
            joins = not any(block.is_better_alone(x[0], c or ()) for block in blocks)
        return self.either(joins, joined, alone)


class Passed:
    """A placeholder of a block that a run before it has computed, so that the other blocks keep their numbers."""

    def __call__(self, x: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True) -> tuple[Any, int]:
        """x, 0."""
        return x, 0


def _between(before: nn.Module | None, block: nn.Module | None, nets: tuple[nn.Module | None, ...]) -> ChannelMap:
    """What is between the couplings of two blocks that follow each other; of one alone, its end or its beginning.

    Raises:
        ChangedError: one of them is not as it was, or has another than these nets.
    """
    for module, net in zip((before, block), nets, strict=True):
        if module is not None and (_changed(module) or module.subnet is not net):
            raise ChangedError(_changed(module) or "another net")
    end = None if before is None else step_parts(before).after
    begin = None if block is None else step_parts(block).before
    if end is None or begin is None:
        found = begin if end is None else end
        assert found is not None
        return found
    return after(end, begin)


def _changed(module: nn.Module) -> str:
    """What keeps it from being called otherwise than as it comes, or nothing."""
    if has_hooks(module):
        return "hooks on it"
    return "a forward of its own" if "forward" in vars(module) else ""


def reason_against(module: nn.Module, memory: str) -> str:
    """Say why a module is no step of a run; empty if it is one."""
    if not isinstance(module, ServedBlock) or type(module) is not module._home:
        return "only AllInOneBlocks are joined"
    if module.splits[0] != module.splits[1]:
        return f"an odd number of channels, {module.in_channels}"
    return _changed(module) or unrepeatable(module.subnet, memory)


def places(modules: Sequence[nn.Module], owner: nn.Module, memory: str) -> list[Place]:
    """Divide the modules of a list into steps that can be joined, if width and condition agree, and others."""
    conditions: list[Any] = getattr(owner, "conditions", None) or [None] * len(modules)  # a SequenceINN has them
    found = []
    for module, cond in zip(modules, conditions, strict=True):
        reason = reason_against(module, memory)
        found.append(Place([module], reason=reason) if reason else Place([module], (module.in_channels, cond)))
    return found


def stand_ins(run: Sequence[Place], memory: str, budget: str | int) -> list[BlockRun | Passed]:
    """Make what replaces a run: a BlockRun in the place of its first block, a Passed in those of the others."""
    blocks: list[Any] = [block for place in run for block in place.layers]
    steps = []
    for previous, block in zip([None, *blocks[:-1]], blocks, strict=True):
        parts = step_parts(block)
        nets = (None if previous is None else previous.subnet, block.subnet)
        mixes = previous is not None or parts.before is not None
        channel_map = partial(_between, previous, block, nets) if mixes else None
        steps.append(JoinedStep(parts.net, parts.spec, channel_map))
    last = partial(_between, blocks[-1], None, (blocks[-1].subnet, None))
    chain = JoinedRun(blocks[0].in_channels, steps, last, memory, budget)
    return [BlockRun(blocks, chain), *(Passed() for _ in blocks[1:])]
