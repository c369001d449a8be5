"""How the net of a coupling is called: with what, in which precision and chunks, and what it must give."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pyglow_fast._dry import device_of
from pyglow_fast._errors import expect
from pyglow_fast.nets.checkerboard import Checkerboard
from pyglow_fast.nets.net_shape import NetShape
from pyglow_fast.nets.plan import Chunk, plan_chunks
from pyglow_fast.nets.precision import in_precision
from pyglow_fast.nets.run import NetCall, inputs_for, run_net
from pyglow_fast.nets.state import holding
from pyglow_fast.nets.traits import check_net


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


class NetRunner(NamedTuple):
    """The net of a coupling as flow steps run it.

    Attributes:
        net: the module.
        width: channels that its output must have, per channel of x1; of an injector's net all.
        budget: bytes of activations, or "auto"; None: it runs in one piece.
        precision: that the net runs in.
        board: of a coupling with a checkerboard mask: x1 is the kept half of images, and the net sees the whole ones.
        injects: the net reads the condition, and nothing of the state.

    Raises:
        ValueError: a BatchNorm in training mode and the like, an output of the wrong shape.
    """

    net: nn.Module
    width: int
    budget: str | int | None
    precision: str = "auto"
    board: Checkerboard | None = None
    injects: bool = False

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

    def call(self, params: Sequence[Tensor] | None = None) -> NetCall:
        """A call of the net with given parameters, or as it is; its output is checked."""

        def called(x1: Tensor, cond: Tensor | None) -> Tensor:
            with contextlib.nullcontext() if params is None else holding(self.net, params):
                net_out = self.net(*inputs_for(self.net, x1, cond))
            self.check_output(x1, tuple(net_out.shape) if isinstance(net_out, Tensor) else type(net_out).__name__)
            return net_out

        board = self.board
        if board is None:
            return called
        return lambda x1, cond: board.net_output(called(*board.net_inputs(x1, cond)))

    def plan(self, x1: Tensor, cond: Tensor | None) -> tuple[Chunk, ...]:
        """Check the net and its :meth:`inputs`, and say how they are cut."""
        check_net(self.net)
        if isinstance(self.net, NetShape):
            self.net.check_inputs(*((x1, cond) if self.board is None else self.board.shaped(x1, cond)))
        return plan_chunks(
            self.net,
            x1.shape,
            x1.element_size(),
            "auto" if self.budget is None else self.budget,
            device_type=device_of(x1).type,
            cond_channels=0 if cond is None else cond.shape[1],
            rows_each=1 if self.board is None else 2,
        )

    def run(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Run net(x1, cond) in chunks and without a record; with no budget in one piece, as autograd records it."""
        x1, cond = self.inputs(x1, cond)
        with in_precision(self.precision, x1):
            call = self.call()
            return call(x1, cond) if self.budget is None else run_net(call, x1, cond, self.plan(x1, cond))
