"""Runs a coupling's net for runs of flow steps: in chunks within a budget, repeatable, parameters from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.coupling_nets.inputs import inputs_for
from pyglow_fast.coupling_nets.net_shape import NetShape
from pyglow_fast.coupling_nets.plan import Chunk, ChunkPlan, plan_chunks
from pyglow_fast.coupling_nets.precision import in_precision
from pyglow_fast.coupling_nets.run import Consume, NetCall, run_net, run_net_backward
from pyglow_fast.coupling_nets.state import (
    GeneratorState,
    RunState,
    check_repeated,
    holding,
    is_repeatable,
    leaves_of,
    output_sums,
    training_modes,
)
from pyglow_fast.coupling_nets.traits import bytes_per_position, check_net, halo_of

Plans = dict[tuple[object, ...], tuple[nn.Module, ChunkPlan]]
REMEMBERED = 64  # plans of a net: lengths of speech are many


@dataclass(frozen=True)
class Memo:
    """Notes that a repetition of a net's run needs: how it was cut, and the state around it."""

    plan: ChunkPlan
    state: RunState
    sums: Tensor | None  # of the output, (N, 2); None if the net is known to repeat


class NetRunner:
    """Runs the net of a coupling in chunks, forward and, repeated, for its backward.

    Args:
        net: the module.
        width: channels that its output must have, per channel of x1.
        budget: bytes of activations, or "auto".
        plans: how inputs of the last shapes are cut, by which net, filled as they come.
        precision: that the net runs in.
        board: of a coupling with a checkerboard mask: x1 is the kept half of images, and the net sees the whole ones.

    Raises:
        ValueError: a BatchNorm in training mode and the like, an output of the wrong shape; in the backward, a net that
            gives another output when it is run again.
    """

    def __init__(
        self,
        net: nn.Module,
        width: int,
        budget: str | int,
        plans: Plans,
        precision: str = "auto",
        board: Checkerboard | None = None,
    ) -> None:
        self.net, self.width, self.budget, self._plans, self.precision = net, width, budget, plans, precision
        self.board = board

    @property
    def params(self) -> list[nn.Parameter]:
        """Parameters that the net has now: torch.func.functional_call may put others in their place for a call."""
        return list(self.net.parameters())

    def _plan(self, x1: Tensor, cond: Tensor | None, random: bool = False) -> ChunkPlan:
        cond_channels = 0 if cond is None else cond.shape[1]
        rows_each = 1 if self.board is None else 2
        cost = bytes_per_position(self.net, x1.shape[1] + cond_channels, x1.element_size())
        given = (self.budget, x1.shape, x1.dtype, x1.device.type, cond_channels, random, rows_each)
        key = (*given, training_modes(self.net), halo_of(self.net), cost)
        net, plan = self._plans.get(key, (None, None))
        if net is not self.net or plan is None:
            check_net(self.net)
            plan = plan_chunks(
                self.net,
                x1.shape,
                x1.element_size(),
                self.budget,
                device_type=x1.device.type,
                cond_channels=cond_channels,
                random=random,
                rows_each=rows_each,
            )
            self._plans[key] = (self.net, plan)
            while len(self._plans) > REMEMBERED:
                self._plans.pop(next(iter(self._plans)), None)
        return plan

    def reads(self, channels: int) -> int:
        """Say how many of a state's C channels, the first ones, are x1: half of them."""
        return channels // 2

    def _out_channels(self, x1: Tensor) -> int:
        return self.width * x1.shape[1]

    def check_width(self, x1: Tensor, channels: int) -> None:
        """Refuse a net that gives so many channels on x1, if these are not those that the coupling takes."""
        if channels != self._out_channels(x1):
            seen = x1 if self.board is None else self.board.shaped(x1, None)[0]
            sizes = seen.shape[0], *seen.shape[2:]
            expected, found = ((sizes[0], count, *sizes[1:]) for count in (self._out_channels(x1), channels))
            expect(False, "net", f"an output of shape {expected}", found)

    def _call(self, params: Sequence[Tensor]) -> NetCall:
        def call(x1: Tensor, cond: Tensor | None) -> Tensor:
            inputs = inputs_for(self.net, *((x1,) if cond is None else (x1, cond)))
            with holding(self.net, params):
                net_out = self.net(*inputs)
            shape = (x1.shape[0], self._out_channels(x1), *x1.shape[2:])
            found = tuple(net_out.shape) if isinstance(net_out, Tensor) else type(net_out).__name__
            expect(found == shape, "net", f"an output of shape {shape}", found)
            return net_out

        board = self.board
        if board is None:
            return call
        return lambda x1, cond: board.net_output(call(*board.net_inputs(x1, cond)))

    def run(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Run net(x1, cond) without a record, with its own parameters."""
        return self.forward(x1, cond, self.params)[0]

    def forward(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor]) -> tuple[Tensor, Memo]:
        """Run net(x1, cond) without a record, and note what repeats it."""
        with in_precision(self.precision, x1):
            return self._forward(x1, cond, params)

    def _forward(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor]) -> tuple[Tensor, Memo]:
        plan = self._plan(x1, cond)
        if isinstance(self.net, NetShape):
            self.net.check_inputs(*((x1, cond) if self.board is None else self.board.shaped(x1, cond)))
        known = is_repeatable(self.net, x1.device)
        before = None if known else GeneratorState.capture(x1.device)
        net_out = run_net(self.net, x1, cond, plan, self._call(params))
        state = RunState.after(self.net, before, x1.device)
        if (
            before is not None
            and state.generators is not None
            and any(chunk.rows != chunk.taken for chunk in plan.chunks)
        ):
            # The net draws random numbers without saying so, and was cut into strips, whose halos drew other numbers
            # than the rows that they repeat: it is run again, not in strips.
            plan = self._plan(x1, cond, random=True)
            with before.replayed():
                net_out = run_net(self.net, x1, cond, plan, self._call(params))
        return net_out, Memo(plan, state, None if known else output_sums(net_out))

    def repeat(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor], memo: Memo) -> Tensor:
        """Compute the output of :meth:`forward` again."""
        with in_precision(self.precision, x1), memo.state.restored(self.net):
            return run_net(self.net, x1, cond, memo.plan, self._call(params))

    def backward(
        self,
        x1: Tensor,
        cond: Tensor | None,
        params: Sequence[Tensor],
        memo: Memo,
        consume: Consume,
        needs_cond: bool,
        same_x1: bool,
        needs_x1: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
        """Compute gradients of x1, cond and params by one more run of the net; see :func:`run_net_backward`.

        same_x1: x1 is that of the forward to the bit, and not recomputed by inversion. The gradient of x1 is None where
        the net reads nothing of the state, or it is not wanted.
        """
        seen = None if memo.sums is None or not same_x1 else torch.zeros_like(memo.sums)

        def watched(net_out: Tensor, chunk: Chunk) -> Tensor:
            if seen is not None:
                seen[chunk.samples] += output_sums(net_out)
            return consume(net_out, chunk)

        with in_precision(self.precision, x1), memo.state.restored(self.net):
            params = leaves_of(self.net, params)
            grad_x1, grad_cond, found = run_net_backward(
                self._call(params),
                x1,
                cond,
                memo.plan,
                watched,
                [parameter for parameter in params if parameter.requires_grad],
                needs_x1=needs_x1,
                needs_cond=needs_cond and cond is not None,
            )
        if seen is not None and memo.sums is not None:
            check_repeated(memo.sums, seen)
        if len(found) < len(params):
            values = iter(found)
            found = tuple(next(values) if parameter.requires_grad else None for parameter in params)
        return grad_x1, grad_cond, found


def condition_for(x: Tensor, cond: Tensor | None) -> Tensor:
    """Check the condition for what reads it alone, and cast it to the dtype of the state x (N, C, *spatial).

    Raises:
        ValueError: none, or one of another batch or other spatial sizes than x.
    """
    expected = f"a tensor of shape ({x.shape[0]}, C_cond, {', '.join(map(str, x.shape[2:]))})"
    expect(isinstance(cond, Tensor), "cond", expected, type(cond).__name__)
    assert cond is not None  # for the type checker: refused above
    fits = cond.dim() == x.dim() and cond.shape[0] == x.shape[0] and cond.shape[2:] == x.shape[2:]
    expect(fits, "cond", expected, f"shape {tuple(cond.shape)}")
    expect(cond.device == x.device, "cond", f"device {x.device} (that of the state)", cond.device)
    return cond.to(x.dtype)


class ConditionRunner(NetRunner):
    """Runs a net that reads the condition and nothing of the state, in the place of x1.

    Args:
        net: the module.
        width: channels that its output must have.
        budget, plans, precision: as of NetRunner.
    """

    def reads(self, channels: int) -> int:
        """Give 0: none of the state's channels are read."""
        return 0

    def _out_channels(self, x1: Tensor) -> int:
        return self.width

    def forward(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor]) -> tuple[Tensor, Memo]:
        """Run net(cond) without a record, and note what repeats it."""
        return super().forward(condition_for(x1, cond), None, params)

    def repeat(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor], memo: Memo) -> Tensor:
        """Compute the output of :meth:`forward` again."""
        return super().repeat(condition_for(x1, cond), None, params, memo)

    def backward(
        self,
        x1: Tensor,
        cond: Tensor | None,
        params: Sequence[Tensor],
        memo: Memo,
        consume: Consume,
        needs_cond: bool,
        same_x1: bool,
        needs_x1: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
        """Compute gradients of the condition, which is that of the forward to the bit, and of params."""
        condition = condition_for(x1, cond)
        grad_cond, _, grads = super().backward(condition, None, params, memo, consume, False, True, needs_cond)
        return None, grad_cond, grads
