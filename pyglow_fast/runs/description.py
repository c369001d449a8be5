"""A run as data: what happens to a state from data to latents.

Layers of this package, and tables of other libraries' layers, describe what they hold; compiled.py and python.py
execute it, choice.py picks which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.dry import device_of
from pyglow_fast._core.errors import expect
from pyglow_fast.nets.checkerboard import Checkerboard
from pyglow_fast.nets.net_shape import NetShape
from pyglow_fast.nets.plan import Chunk, plan_chunks
from pyglow_fast.nets.precision import in_precision
from pyglow_fast.nets.run import NetCall, condition_for, inputs_for, run_net
from pyglow_fast.nets.state import holding
from pyglow_fast.nets.traits import check_net
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.runs.maps import KINDS, ChannelMap, Folding, Map, folding_of


class NetCoupling(NamedTuple):
    """A coupling of a run: the first channels, ``kept``, decide by a net how the others are shifted and scaled.

    With a checkerboard they are channels of the state that :meth:`Checkerboard.enter` gives, and the net sees the whole
    images that the kept half is of.
    """

    net: nn.Module
    spec: CouplingSpec
    kept: int  # 0 where the net reads the condition, and nothing of the state
    changed: int
    precision: str = "auto"  # that the net runs in
    board: Checkerboard | None = None

    @property
    def injects(self) -> bool:
        """Whether the net reads the condition, and nothing of the state."""
        return self.kept == 0

    @property
    def outputs(self) -> int:
        """How many channels the net gives."""
        return self.changed if self.spec.coupling == "additive" else 2 * self.changed

    def inputs(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Give the tensors that chunks are cut from: what is kept of a state and cond, or the condition alone."""
        return (x[:, : self.kept], cond) if self.kept else (condition_for(x, cond), None)

    def check_output(self, seen: Tensor, found: object) -> None:
        """Refuse an output of a shape, found, that is not the one which the coupling takes, given what the net sees."""
        shape = (seen.shape[0], self.outputs, *seen.shape[2:])
        if found != shape:
            expect(False, "net", f"an output of shape {shape}", found)

    def call(self, params: Sequence[Tensor] | None = None) -> NetCall:
        """A call of the net with given parameters, or as it is; its output is checked."""

        def called(x1: Tensor, cond: Tensor | None) -> Tensor:
            with contextlib.nullcontext() if params is None else holding(self.net, params):
                net_out = self.net(*inputs_for(self.net, x1, cond))
            self.check_output(x1, tuple(net_out.shape) if isinstance(net_out, Tensor) else type(net_out).__name__)
            checked: Tensor = net_out
            return checked

        board = self.board
        if board is None:
            return called
        other = 1 - board.parity
        return lambda x1, cond: functional.checkerboard_split(called(*board.net_inputs(x1, cond)), other, both=False)

    def plan(self, x1: Tensor, cond: Tensor | None, budget: str | int) -> tuple[Chunk, ...]:
        """Check the net and its :meth:`inputs`, and say how they are cut for a budget of bytes, or "auto"."""
        check_net(self.net)
        if isinstance(self.net, NetShape):
            self.net.check_inputs(*((x1, cond) if self.board is None else self.board.shaped(x1, cond)))
        return plan_chunks(
            self.net,
            x1.shape,
            x1.element_size(),
            budget,
            device_type=device_of(x1).type,
            cond_channels=0 if cond is None else cond.shape[1],
            rows_each=1 if self.board is None else 2,
        )

    def run(self, x: Tensor, cond: Tensor | None, budget: str | int | None = None) -> Tensor:
        """Run the net on a state in chunks and without a record; with no budget whole, as autograd records it."""
        x1, cond = self.inputs(x, cond)
        with in_precision(self.precision, x1):
            call = self.call()
            return call(x1, cond) if budget is None else run_net(call, x1, cond, self.plan(x1, cond, budget))


Element = Map | NetCoupling


class Frame(NamedTuple):
    """How a state enters the form that kernels and couplings take, and how it leaves it.

    The chooser (choice.py) alone enters and leaves; executors see what is inside. States of another kind need another
    ``enter`` and ``leave``, and nothing else of a run.
    """

    squeezes: bool = False  # x (N, C / 2^d, *(2 spatial)) enters squeezed; it leaves so too
    first: Checkerboard | None = None  # halves what enters, as the first coupling wants it; None with channel masks
    last: Checkerboard | None = None  # puts the halves of the last coupling together
    masked: bool = False  # a state is zero where the first channel of the condition is, and the result will be

    def turned(self) -> Frame:
        """Return the frame of the run that goes back."""
        return Frame(self.squeezes, self.last, self.first, self.masked)

    def squeezed(self) -> Frame:
        """Return the frame of states that are squeezed already."""
        return Frame(False, self.first, self.last, self.masked)

    def enter(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Bring a state and the condition of its nets into the form that the couplings take."""
        x = functional.squeeze(x) if self.squeezes else x
        return (x, cond) if self.first is None else self.first.enter(x, cond)

    def leave(self, x: Tensor) -> Tensor:
        """Bring a state out of the form that the couplings take."""
        return x if self.last is None else self.last.leave(x)


class Run(NamedTuple):
    """Couplings of one mask with channel maps before each, and perhaps behind the last, computed together.

    It goes from data to latents; :meth:`turned` gives the one that goes back. A step of that undoes a coupling and then
    its map. ``watch`` is given, for each part, the largest magnitudes of every coupling's input u, shift and raw scale,
    (K, 3), NaN where one is.

    Python computes two kinds of runs alone, since no run of images is one. Those with ``frame.masked`` are of speech:
    each map puts its offset where nothing is, so that states are masked behind each. Those that are ``inverted`` are of
    other libraries' layers, which invert their maps in their own way, and whose digits stay.
    """

    maps: Sequence[Sequence[Map]]  # of each coupling, in the order in which a state meets them
    couplings: Sequence[NetCoupling]  # their nets need no data any more
    behind: Sequence[Map] = ()  # maps behind the last coupling; of a run that is turned, before the first
    frame: Frame = Frame()  # how a state comes in and goes out
    inverse: bool = False  # the run is turned
    inverted: bool = False  # maps of a run that is turned, one at a place at most, are inverses, made by their owners
    watch: Callable[[Tensor], None] | None = None

    @classmethod
    def of(
        cls, elements: Iterable[Element], *, squeezes: bool = False, masked: bool = False, inverted: bool = False
    ) -> Run:
        """A run of these, in the order of data to latents."""
        maps: list[list[Map]] = [[]]
        couplings = []
        for one in elements:
            if isinstance(one, Map):
                maps[-1].append(one)
            else:
                couplings.append(one)
                maps.append([])
        first, last = (couplings[0].board, couplings[-1].board) if couplings else (None, None)
        return cls(maps[:-1], couplings, maps[-1], Frame(squeezes, first, last, masked), inverted=inverted)

    def turned(self) -> Run:
        """The run from latents to data, which undoes this one."""
        return self.changed(
            maps=self.maps[::-1], couplings=self.couplings[::-1], frame=self.frame.turned(), inverse=True
        )

    def changed(self, **fields: Any) -> Run:
        """The run with other fields; torch.compile of torch 2.11 cannot hand on what ``_replace`` makes."""
        return Run(**(self._asdict() | fields))

    def of_own_inverses(self) -> Run:
        """The same run, whose maps are those of data to latents: the inverses of what owners have made."""
        undone = [[Map.of(ChannelMap(*one.tensors).undone()) for one in own] for own in (*self.maps, self.behind)]
        return self.changed(maps=undone[:-1], behind=undone[-1], inverted=False)

    @property
    def ends(self) -> Run:
        """The run without its couplings: the maps behind the last one alone, in the direction of the run."""
        return self.changed(maps=(), couplings=(), frame=Frame(masked=self.frame.masked))

    def parameters(self) -> list[Tensor]:
        """List those of all nets."""
        return [parameter for coupling in self.couplings for parameter in coupling.net.parameters()]

    @property
    def places(self) -> list[Sequence[Map]]:
        """The maps of all couplings and, if there are any, those behind the last one, as a state meets them."""
        behind = [self.behind] if self.behind else []
        return [*behind, *self.maps] if self.inverse else [*self.maps, *behind]

    def folding(self, first: int = 0, end: int | None = None) -> tuple[list[Tensor], Folding]:
        """The raw tensors of the maps of couplings first .. end - 1, or of all places, and what folds them.

        Maps are folded as they are from data to latents, whichever direction the run has. It has one.
        """
        maps = self.places if end is None else self.maps[first:end]
        like = [own[0] for own in (*maps, *self.maps) if own]
        swaps: list[bool] = []
        if self._halves(like[0]):
            turn = -1 if self.inverse else 1
            boards = [coupling.board for coupling in self.couplings][::turn]
            swaps = [before != own for before, own in pairwise([boards[0], *boards])][::turn][first:end]
        return folding_of(maps, like[0].tensors[1], swaps)

    def _halves(self, one: Map) -> bool:
        """Tell whether a map is of whole states, which a checkerboard halves; frozen layers hold maps of the halves."""
        if self.frame.first is None:
            return False
        return len(one.tensors[1]) != self.couplings[0].kept + self.couplings[0].changed

    @property
    def map_bytes(self) -> int:
        """Bytes of the folded map before a coupling, at most; there is one."""
        each = [one for own in self.maps for one in own]
        offset, halves = each[0].tensors[1], 2 if self._halves(each[0]) else 1
        gathers = [KINDS[one.kind].gathers for one in each]
        return halves * offset.nbytes * (1 if all(gathers) else halves * len(offset))
