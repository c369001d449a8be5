"""The compiled executor: the autograd node of a run, in either direction, over the calls of csrc/run.

A run is cut into parts, each a node of its own; parts.py says why. A node saves its input or output, the parameters,
and what its memory mode keeps between the steps. One that does not know its input saves what computes it again too: the
last state that is kept before, and the parameters of the steps behind that. These are kept anyway, by the nodes before;
but what a node saves is there for its own backward alone. Channel maps are folded inside each node from raw parameters,
and again in its backward: only mode "store" keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._core import float32
from pyglow_fast._core.backend import require
from pyglow_fast._core.derivatives import Saved, apply_to_plain, differentiable_once
from pyglow_fast._core.dry import device_of
from pyglow_fast.nets.precision import in_precision
from pyglow_fast.runs.deferred import accepted
from pyglow_fast.runs.description import Run
from pyglow_fast.runs.drift import SKETCHED, DriftControl, signs_of
from pyglow_fast.runs.maps import Folding, undone_gradients
from pyglow_fast.runs.parts import Part, RunPass, cut, part_limit

FOLDED_AT_ONCE = 128 * 1024  # bytes of channel maps that a node folds; with fewer a backward would fold more often


class CompiledRun(NamedTuple):
    """The couplings of a run in the form that csrc/run takes."""

    run: Run  # that they are of, for their channel maps
    forms: Sequence[Any]  # of the couplings and their nets
    nets: Sequence[Tensor]  # the nets' tensors, one net after another
    lowest: torch.dtype  # that the nets compute in, if lower than the state's
    precision: str = "auto"  # that the nets are to be run in, see in_precision


class _Node(NamedTuple):
    """One node's part of a run: all but its tensors."""

    part: Part
    mode: str
    forms: Sequence[Any]
    squeezes: bool
    form: Any
    fold: Folding
    n_nets: int
    inverse: bool
    lowest: torch.dtype
    precision: str
    watch: Callable[[Tensor], None] | None


class _Way:
    """The nodes and tensors that compute the input of the next part again, from the last state that is kept."""

    def __init__(self) -> None:
        self.legs: list[tuple[_Node, int]] = []  # the nodes on the way, and from which of its steps on each of them is
        self.tensors: list[Sequence[Tensor]] = []  # that state; then of each node those of these steps, in its order

    def goes_on(self, node: _Node, x: Tensor, anchors: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Lead on through a node, which has this input and these tensors, and keeps these states inside."""
        first = node.part.anchors[-1] if anchors else 0
        if anchors or node.part.knows_start:
            self.legs, self.tensors = [], [[anchors[-1] if anchors else x]]
        skipped = sum([form.tensors for form in node.forms[:first]])
        self.legs, self.tensors = [*self.legs, (node, first)], [*self.tensors, tensors[skipped:]]


class _RunNode(torch.autograd.Function):
    """z, log_det of a part of a run."""

    @staticmethod
    def forward(
        ctx: Any, node: _Node, way: _Way, x: Tensor, cond: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z like x (squeezed), log_det (N,). tensors: of the nets, then what the maps are folded from."""
        nets, raw = tensors[: node.n_nets], tensors[node.n_nets :]
        maps = node.fold(raw)
        found = require().run_forward(node.form, x, cond, inverted(maps) if node.inverse else maps, nets)
        z, own = found.z, found.kept
        if node.watch is not None:
            node.watch(found.largest)
        part, reversible, stores = node.part, node.mode == "reversible", node.mode == "store"
        knows_start = not reversible or part.knows_start
        anchors = own.anchors
        kept = [nets, raw, anchors, own.states, own.outputs, own.nets, maps if stores else []]
        kept += [] if knows_start else way.tensors
        ctx.node, ctx.legs, ctx.counts = node, [] if knows_start else way.legs, [*map(len, kept)]
        keeps_z = stores or (reversible and part.begins_backward)
        ctx.save_for_backward(
            x if knows_start else None,
            z if keeps_z else None,
            cond,
            own.seen,
            own.start,
            *chain.from_iterable(kept),
        )
        if reversible and part.run_pass.backward_end is not None:
            way.goes_on(node, x, anchors, tensors)
        return z, found.log_det

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond, the nets' tensors and what the maps are folded from."""
        node: _Node = ctx.node
        part, run_pass, reversible = node.part, node.part.run_pass, node.mode == "reversible"
        (x, z, cond, seen, start), rest, extension = saved[:5], iter(saved[5:]), require()
        lists = [list(islice(rest, count)) for count in ctx.counts]
        nets, raw, anchors, states, outputs, of_nets, folded, *way = lists
        if reversible:
            left = run_pass.take_state(part)
            z = z if left is None else left
        judged, limit, redone_before = extension.Judged.each, 0.0, 0
        if run_pass.control is not None and reversible:
            judged, limit = run_pass.judges(grad_z), run_pass.control.limit(grad_z.dtype, node.lowest)

        def restored() -> Tensor:
            nonlocal redone_before
            redone_before = sum(len(own.forms) - first for own, first in ctx.legs)
            return _restored(ctx.legs, cond, *way)

        needs, maps = ctx.needs_input_grad, folded or node.fold(raw)
        undone: Sequence[Tensor] = inverted(maps) if reversible or node.inverse else []
        args = extension.BackwardArgs(
            x=x,
            z=z,
            cond=cond,
            grad_z=grad_z,
            grad_log_det=grad_log_det,
            kept=extension.Kept(anchors=anchors, states=states, outputs=outputs, nets=of_nets, seen=seen, start=start),
            wants=needs[4 : 4 + node.n_nets],
            wants_cond=needs[3],
            judged=judged,
            limit=limit,
            restored=restored,
        )
        with in_precision(node.precision, grad_z):
            found = extension.run_backward(node.form, maps, undone, nets, args)
        drifted = None
        if reversible:
            worst = found.worst if judged is extension.Judged.later else found.drift
            drifted = run_pass.judged(part, worst, limit, found.redone + redone_before)
            run_pass.leave_state(part, found.start)
        elif node.mode == "checkpoint":
            run_pass.checkpointed(part, grad_z.device)
        grads: Sequence[Any] = (found.x, found.cond, found.matrices, found.offsets, found.log_dets, *found.nets)
        grads = grads if drifted is None else accepted(grads, drifted)
        of_raw: Sequence[Tensor | None] = [None] * len(raw)
        if any(needs[4 + node.n_nets :]):  # which are linear in those of the maps: of zeros they are zeros
            matrices, offsets, log_dets = cast("Sequence[Tensor]", grads[2:5])
            if node.inverse:
                gathers = undone[3] if len(undone) > 3 else None
                matrices, offsets = undone_gradients((undone[0], gathers), matrices, offsets)
            of_raw = node.fold.gradients(raw, matrices, offsets, log_dets)
        return (None, None, *grads[:2], *grads[5:], *of_raw)


def _keeps_nothing(forms: Sequence[Any], squeezes: bool = False, watches: bool = False) -> Any:
    """The steps as a part of csrc/run that no backward follows."""
    extension = require()
    return extension.Part(
        steps=forms,
        squeezes=squeezes,
        mode=extension.Mode.none,
        anchors=[],
        knows_start=True,
        signs=None,
        watches=watches,
    )


def _signs(positions: int, x: Tensor) -> Any:
    """The signs of states like x, and those of a sketch, as csrc/run takes them."""
    (inner, outer, total), sketched = signs_of(positions, x.dtype, x.device)
    return require().Signs(
        inner=inner,
        outer=outer,
        sum=total,
        sketch_inner=sketched.inner,
        sketch_outer=sketched.outer,
        sketch_sums=sketched.sum,
        rounds=float32.rounds(float32.PRODUCTS, x),
    )


def _restored(
    legs: Sequence[tuple[_Node, int]], cond: Tensor | None, kept: Sequence[Tensor], *tensors: Sequence[Tensor]
) -> Tensor:
    """The true input of a node, forward through the legs of its way."""
    (state,) = kept
    for (node, first), own in zip(legs, tensors, strict=True):
        n_nets = sum(form.tensors for form in node.forms[first:])
        folded = [part[first:] for part in node.fold(own[n_nets:])]
        maps = inverted(folded) if node.inverse else folded
        form = _keeps_nothing(node.forms[first:], node.squeezes and first == 0)
        state = require().run_forward(form, state, cond, maps, own[:n_nets]).z
    return state


def run_recorded(
    steps: CompiledRun,
    mode: str,
    control: DriftControl | None,
    x: Tensor,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute z and log|det dz/dx| (N,) of a run whose backward may follow; of a run that is turned, z are data.

    Arguments are those of choice.through; ``control`` is of the drift, in mode "reversible".
    """
    squeezes = steps.run.frame.squeezes
    if squeezes and not len(x):  # torch's pixel_unshuffle, by which states are compared, leaves an empty one as it is
        x, squeezes = functional.squeeze(x), False
    positions = math.prod(x.shape[2:]) // (2 ** (x.dim() - 2) if squeezes else 1)
    few = positions <= SKETCHED  # a sketch of such a state would be no smaller
    between = x.nbytes if few or control is None else x.nbytes // positions * SKETCHED
    nets_at, net_bytes = [0], []
    for form in steps.forms:
        nets_at.append(nets_at[-1] + form.tensors)
        net_bytes.append(sum(map(attrgetter("nbytes"), steps.nets[nets_at[-2] : nets_at[-1]])))
    limit = part_limit(device_of(x).type == "cpu", net_bytes, between)
    run_pass = RunPass(control, cut(net_bytes, steps.run.map_bytes, limit, FOLDED_AT_ONCE), few)
    keeps = "checkpoint" if mode == "reversible" and run_pass.keeps_states else mode
    signs = _signs(positions, x) if keeps == "reversible" else None
    log_dets, way, watch = [], _Way(), steps.run.watch
    for part in run_pass.parts:
        raw, fold = steps.run.folding(part.first, part.end)
        forms, nets = steps.forms[part.first : part.end], steps.nets[nets_at[part.first] : nets_at[part.end]]
        run_pass.note_inputs(part.first, x.device, (x, cond, *nets, *raw))
        squeezes_here = squeezes and part.index == 0
        form = require().Part(
            steps=forms,
            squeezes=squeezes_here,
            mode=require().Mode[keeps],
            anchors=part.anchors,
            knows_start=part.knows_start,
            signs=signs,
            watches=watch is not None,
        )
        settings = steps.run.inverse, steps.lowest, steps.precision, watch
        node = _Node(part, keeps, forms, squeezes_here, form, fold, len(nets), *settings)
        with in_precision(steps.precision, x):
            x, log_det = apply_to_plain(_RunNode, node, way, x, cond, *nets, *raw)
        log_dets.append(log_det)
    return x, functional.summed(log_dets)


def run_plain(steps: CompiledRun, x: Tensor, cond: Tensor | None, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute what :func:`run_recorded` does without a record, given the folded maps; to undo them, their inverses."""
    form = _keeps_nothing(steps.forms, steps.run.frame.squeezes, steps.run.watch is not None)
    with in_precision(steps.precision, x):
        found = require().run_forward(form, x, cond, maps, steps.nets)
    if steps.run.watch is not None:
        steps.run.watch(found.largest)
    return found.z, found.log_det


def folded_maps(steps: CompiledRun) -> Sequence[Tensor]:
    """Fold the maps of all couplings: matrices (those of a run that is turned inverted), offsets, log_dets, indices."""
    raw, fold = steps.run.folding(0, len(steps.forms))
    maps = fold(raw)
    return inverted(maps) if steps.run.inverse else maps


def inverted(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Invert the matrices of folded maps; offsets and log_dets stay those of the maps."""
    found: Sequence[Tensor] = require().inverted(maps)
    return found
