"""Runs a coupling's net for runs of flow steps: in chunks within a budget, repeatable, parameters from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast._dry import device_of
from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.coupling_nets.net_shape import NetShape
from pyglow_fast.coupling_nets.plan import Chunk, plan_chunks
from pyglow_fast.coupling_nets.precision import in_precision
from pyglow_fast.coupling_nets.run import Consume, NetCall, inputs_for, run_net, run_net_backward
from pyglow_fast.coupling_nets.state import RunState, check_repeated, holding, leaves_of, output_sums, states_before
from pyglow_fast.coupling_nets.traits import check_net


class Memo(NamedTuple):
    """Notes that a repetition of a net's run needs: how it was cut, and the state around it."""

    plan: tuple[Chunk, ...]
    state: RunState


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


class NetRunner:
    """Runs the net of a coupling in chunks, forward and, repeated, for its backward.

    Args:
        net: the module.
        width: channels that its output must have, per channel of x1; of an injector's net all.
        budget: bytes of activations, or "auto".
        precision: that the net runs in.
        board: of a coupling with a checkerboard mask: x1 is the kept half of images, and the net sees the whole ones.
        injects: the net reads the condition, and nothing of the state.

    Raises:
        ValueError: a BatchNorm in training mode and the like, an output of the wrong shape; in the backward, a net that
            gives another output when it is run again.
    """

    def __init__(
        self,
        net: nn.Module,
        width: int,
        budget: str | int,
        precision: str = "auto",
        board: Checkerboard | None = None,
        injects: bool = False,
    ) -> None:
        self.net, self.width, self.budget, self.precision = net, width, budget, precision
        self.board, self.injects = board, injects

    @property
    def params(self) -> list[nn.Parameter]:
        """Parameters that the net has now: torch.func.functional_call may put others in their place for a call."""
        return list(self.net.parameters())

    def reads(self, channels: int) -> int:
        """Say how many of a state's C channels, the first ones, are x1: half of them, or none."""
        return 0 if self.injects else channels // 2

    def inputs(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Give the tensors that chunks are cut from: x1 and cond, or for an injector the condition in place of x1."""
        return (condition_for(x1, cond), None) if self.injects else (x1, cond)

    def check_output(self, seen: Tensor, found: object) -> None:
        """Refuse an output of a shape, found, that is not the one which the coupling takes, given what the net sees."""
        channels = self.width if self.injects else self.width * seen.shape[1]
        shape = (seen.shape[0], channels, *seen.shape[2:])
        if found != shape:
            expect(False, "net", f"an output of shape {shape}", found)

    def check_width(self, x1: Tensor, channels: int) -> None:
        """Refuse a net that gives so many channels on x1, if these are not those that the coupling takes."""
        seen = x1 if self.board is None else self.board.shaped(x1, None)[0]
        self.check_output(seen, (seen.shape[0], channels, *seen.shape[2:]))

    def _call(self, params: Sequence[Tensor] | None) -> NetCall:
        """A call of the net with given parameters, or as it is; its output is checked."""

        def call(x1: Tensor, cond: Tensor | None) -> Tensor:
            with contextlib.nullcontext() if params is None else holding(self.net, params):
                net_out = self.net(*inputs_for(self.net, x1, cond))
            self.check_output(x1, tuple(net_out.shape) if isinstance(net_out, Tensor) else type(net_out).__name__)
            return net_out

        board = self.board
        if board is None:
            return call
        return lambda x1, cond: board.net_output(call(*board.net_inputs(x1, cond)))

    def plan(self, x1: Tensor, cond: Tensor | None) -> tuple[Chunk, ...]:
        """Check the net and its :meth:`inputs`, and say how they are cut."""
        check_net(self.net)
        if isinstance(self.net, NetShape):
            self.net.check_inputs(*((x1, cond) if self.board is None else self.board.shaped(x1, cond)))
        return plan_chunks(
            self.net,
            x1.shape,
            x1.element_size(),
            self.budget,
            device_type=device_of(x1).type,
            cond_channels=0 if cond is None else cond.shape[1],
            rows_each=1 if self.board is None else 2,
        )

    def whole(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Run net(x1, cond) in one piece, as autograd records it."""
        x1, cond = self.inputs(x1, cond)
        with in_precision(self.precision, x1):
            return self._call(None)(x1, cond)

    def run(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Run net(x1, cond) without a record."""
        x1, cond = self.inputs(x1, cond)
        with in_precision(self.precision, x1):
            return run_net(self._call(None), x1, cond, self.plan(x1, cond))

    def forward(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor]) -> tuple[Tensor, Memo]:
        """Run net(x1, cond) without a record, and note what repeats it."""
        x1, cond = self.inputs(x1, cond)
        plan = self.plan(x1, cond)
        with in_precision(self.precision, x1):
            before = states_before(self.net, x1.device)
            net_out = run_net(self._call(params), x1, cond, plan)
            return net_out, Memo(plan, RunState.after(self.net, before, net_out))

    def repeat(self, x1: Tensor, cond: Tensor | None, params: Sequence[Tensor], memo: Memo) -> Tensor:
        """Compute the output of :meth:`forward` again."""
        with in_precision(self.precision, x1), memo.state.restored(self.net):
            return run_net(self._call(params), *self.inputs(x1, cond), memo.plan)

    def backward(
        self,
        x1: Tensor,
        cond: Tensor | None,
        params: Sequence[Tensor],
        memo: Memo,
        consume: Consume,
        needs_cond: bool,
        same_x1: bool,
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
        """Compute gradients of x1, cond and params by one more run of the net; see :func:`run_net_backward`.

        same_x1: x1 is that of the forward to the bit, and not recomputed by inversion. The gradient of x1 is None where
        the net reads nothing of the state.
        """
        sums = memo.state.sums if same_x1 or self.injects else None
        seen = None if sums is None else torch.zeros_like(sums)

        def watched(net_out: Tensor, chunk: Chunk) -> Tensor:
            if seen is not None:
                seen[chunk.samples] += output_sums(net_out)
            return consume(net_out, chunk)

        with in_precision(self.precision, x1), memo.state.restored(self.net):
            params = leaves_of(self.net, params)
            grad_x1, grad_cond, found = run_net_backward(
                self._call(params),
                *self.inputs(x1, cond),
                memo.plan,
                watched,
                params,
                needs_x1=needs_cond or not self.injects,
                needs_cond=needs_cond,
            )
        if seen is not None and sums is not None:
            check_repeated(sums, seen)
        return (None, grad_x1, found) if self.injects else (grad_x1, grad_cond, found)
