"""The autograd node of a run: K flow steps whose forward, inverse and backward are calls of csrc/run.

A run is cut into parts, each a node of its own; parts.py says why. A node saves its input or output, the parameters,
and what its memory mode keeps between the steps. One that does not know its input saves what computes it again too: the
last state that is kept before, and the parameters of the steps behind that. These are kept anyway, by the nodes before;
but what a node saves is there for its own backward alone. Channel maps are folded inside each node from raw parameters,
and again in its backward: only mode "store" keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, islice, pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyglow_fast import _float32, functional
from pyglow_fast._backend import require
from pyglow_fast._derivatives import Saved, apply_to_plain, differentiable_once, passed_back
from pyglow_fast.nets.precision import in_precision
from pyglow_fast.reference import n_positions
from pyglow_fast.runs.deferred import accepted
from pyglow_fast.runs.drift import SKETCHED, DriftControl, signs_of
from pyglow_fast.runs.parts import Part, Whole, part_limit

FOLDED_AT_ONCE = 128 * 1024  # bytes of channel maps that a node folds; with fewer a backward would fold more often


class FoldByTorch:
    """Folds raw tensors to channel maps by a function of torch's ops, which autograd differentiates."""

    def __init__(self, function: Callable[[Sequence[Tensor]], Any]) -> None:
        self._function = function

    def __call__(self, raw: Sequence[Tensor]) -> Sequence[Tensor]:
        """Fold matrices (K, C, C), offsets (K, C), log_dets (K,) and, of gathers, indices (K, C), without a record."""
        with torch.no_grad():
            return [part for part in self._function(raw) if part is not None]

    def gradients(
        self, raw: Sequence[Tensor], matrices: Tensor, offsets: Tensor, log_dets: Tensor
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of the raw tensors from those of the maps; None for those that want none."""
        leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in raw]
        with torch.enable_grad():
            found = self._function(leaves)
        return passed_back(found[:3], (matrices, offsets, log_dets), leaves)


GIVEN = FoldByTorch(lambda raw: raw)  # of maps that someone has folded, or of none at all


FACTORS, CONSTANTS = ("log_scale", "bias", "lower", "upper", "log_diag"), ("permutation", "sign_diag")


class FoldFactors:
    """Folds actnorms and invertible 1x1 convolutions in LU factors, in csrc/run.

    Raw tensors are, of all steps each, those that FACTORS and CONSTANTS name.
    """

    def __call__(self, raw: Sequence[Tensor]) -> Sequence[Tensor]:
        """Fold, without a record."""
        found: Sequence[Tensor] = require().fold(*self._split(raw))
        return found

    def gradients(
        self, raw: Sequence[Tensor], matrices: Tensor, offsets: Tensor, log_dets: Tensor
    ) -> Sequence[Tensor | None]:
        """Compute the gradients of the parameters; None for constants."""
        factors, *constants = self._split(raw)
        stacked = require().fold_backward(factors, *constants, matrices, offsets, log_dets)
        return [*(one for each in stacked for one in each.unbind()), *[None] * (len(raw) - len(factors))]

    @staticmethod
    def _split(raw: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """The factors, the permutations and the signs of all steps."""
        count = len(raw) // len((*FACTORS, *CONSTANTS))
        return raw[: -2 * count], raw[-2 * count : -count], raw[-count:]


Fold = FoldByTorch | FoldFactors


class Maps(NamedTuple):
    """Where the channel maps before the couplings of a run come from.

    Attributes:
        ends: one past the last coupling of each unit that may end a node, ascending.
        nbytes: of the maps of a unit, at most.
        of: gives the raw tensors of units first .. end - 1, and what folds them.
    """

    ends: Sequence[int]
    nbytes: int
    of: Callable[[int, int], tuple[Sequence[Tensor], Fold]]

    def bounds(self, step_bytes: Sequence[int], limit: int | None, at_once: int) -> list[tuple[int, int]]:
        """Cut the units into nodes (first, one past the last) of so many bytes of gradients and of maps at most.

        step_bytes: of the nets' gradients.
        """
        ends, most = self.ends, max(1, at_once // self.nbytes)
        if limit is None or (len(ends) <= most and sum(step_bytes) <= limit):
            return [(0, len(ends))]
        found, start, grads, first = [], 0, 0, 0
        for unit, end in enumerate(ends):
            own = sum(step_bytes[first:end])
            if unit > start and (grads + own > limit or unit - start >= most):
                found.append((start, unit))
                start, grads = unit, 0
            grads, first = grads + own, end
        return [*found, (start, len(ends))]


def no_maps(count: int) -> Maps:
    """The maps of steps that have none, any of which may end a node."""
    return Maps(range(1, count + 1), 1, lambda first, end: ([], GIVEN))


def given_maps_of(stacked: Sequence[Tensor]) -> Maps:
    """The maps before K couplings, folded and stacked, any of which may end a node."""
    nbytes = stacked[0][0].nbytes

    def of(first: int, end: int) -> tuple[Sequence[Tensor], Fold]:
        return [part[first:end] for part in stacked], GIVEN

    return Maps(range(1, len(stacked[0]) + 1), nbytes, of)


class Steps(NamedTuple):
    """K couplings of a run with the channel map before each, described for csrc/run.

    Attributes:
        forms: of the couplings and their nets.
        nets: the nets' tensors, one net after another.
        maps: where the channel maps come from.
        lowest: the dtype that the nets compute in, if lower than the state's.
        precision: that the nets are to be run in, see in_precision.
        watch: is given, for each part of a recorded or plain run, the largest magnitudes of every step's input u, shift
            and raw scale, (K, 3), NaN where one is; None: nobody wants them.
    """

    forms: Sequence[Any]
    nets: Sequence[Tensor]
    maps: Maps
    lowest: torch.dtype
    precision: str = "auto"
    watch: Callable[[Tensor], None] | None = None


class _Node(NamedTuple):
    """One node's part of a run: all but its tensors."""

    part: Part
    mode: str
    forms: Sequence[Any]
    squeezes: bool
    form: Any
    fold: Fold
    n_nets: int
    lowest: torch.dtype
    precision: str
    watch: Callable[[Tensor], None] | None


class _Way:
    """From the last state that is kept to the input of the next part: what computes this again.

    Attributes:
        legs: the nodes on the way, and from which of its steps on each of them is.
        tensors: that state; then of each node those of these steps, in its order.
    """

    def __init__(self) -> None:
        self.legs: list[tuple[_Node, int]] = []
        self.tensors: list[Sequence[Tensor]] = []

    def goes_on(self, node: _Node, x: Tensor, anchors: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Lead on through a node, which has this input and these tensors, and keeps these states inside."""
        first = node.part.anchors[-1] if anchors else 0
        if anchors or node.part.knows_start:
            self.legs, self.tensors = [], [[anchors[-1] if anchors else x]]
        skipped = sum(form.tensors for form in node.forms[:first])
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
        found = require().run_forward(node.form, x, cond, maps, nets)
        z, own = found.z, found.kept
        if node.watch is not None:
            node.watch(found.largest)
        part, reversible, stores = node.part, node.mode == "reversible", node.mode == "store"
        knows_start = not reversible or part.knows_start
        anchors = own.anchors
        kept = [nets, raw, anchors, own.states, own.outputs, own.nets, maps if stores else []]
        kept += [] if knows_start else way.tensors
        ctx.node, ctx.legs, ctx.counts = node, [] if knows_start else way.legs, [*map(len, kept)]
        keeps_z = stores or (reversible and part.is_last)
        ctx.save_for_backward(
            x if knows_start else None,
            z if keeps_z else None,
            cond,
            own.seen,
            own.start,
            *chain.from_iterable(kept),
        )
        if reversible and part.whole.final is not None:
            way.goes_on(node, x, anchors, tensors)
        return z, found.log_det

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond, the nets' tensors and what the maps are folded from."""
        node: _Node = ctx.node
        part, whole, reversible = node.part, node.part.whole, node.mode == "reversible"
        (x, z, cond, seen, start), rest, extension = saved[:5], iter(saved[5:]), require()
        lists = [list(islice(rest, count)) for count in ctx.counts]
        nets, raw, anchors, states, outputs, of_nets, folded, *way = lists
        if reversible:
            left = whole.take(part)
            z = z if left is None else left
        judged, limit, redone_before = extension.Judged.each, 0.0, 0
        if whole.control is not None and reversible:
            judged, limit = whole.judges(grad_z), whole.control.limit(grad_z.dtype, node.lowest)

        def restored() -> Tensor:
            nonlocal redone_before
            redone_before = sum(len(own.forms) - first for own, first in ctx.legs)
            return _restored(ctx.legs, cond, *way)

        needs = ctx.needs_input_grad
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
            found = extension.run_backward(node.form, folded or node.fold(raw), nets, args)
        drifted = None
        if reversible:
            worst = found.worst if judged is extension.Judged.later else found.drift
            drifted = whole.judged(part, worst, limit, found.redone + redone_before)
            whole.leave(part, found.start)
        elif node.mode == "checkpoint":
            whole.checkpointed(part, grad_z.device)
        grads: Sequence[Any] = (found.x, found.cond, found.matrices, found.offsets, found.log_dets, *found.nets)
        grads = grads if drifted is None else accepted(grads, drifted)
        of_raw: Sequence[Tensor | None] = [None] * len(raw)
        if any(needs[4 + node.n_nets :]):  # which are linear in those of the maps: of zeros they are zeros
            of_raw = node.fold.gradients(raw, *cast("Sequence[Tensor]", grads[2:5]))
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
        rounds=_float32.rounds(_float32.PRODUCTS, x),
    )


def _restored(
    legs: Sequence[tuple[_Node, int]], cond: Tensor | None, kept: Sequence[Tensor], *tensors: Sequence[Tensor]
) -> Tensor:
    """The true input of a node, forward through the legs of its way."""
    (state,) = kept
    for (node, first), own in zip(legs, tensors, strict=True):
        n_nets = sum(form.tensors for form in node.forms[first:])
        maps = [part[first:] for part in node.fold(own[n_nets:])]
        form = _keeps_nothing(node.forms[first:], node.squeezes and first == 0)
        state = require().run_forward(form, state, cond, maps, own[:n_nets]).z
    return state


def run_recorded(
    steps: Steps,
    mode: str,
    control: DriftControl | None,
    x: Tensor,
    cond: Tensor | None = None,
    squeezes: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute z and log|det dz/dx| of a run whose backward may follow.

    Args:
        steps: of the run.
        mode: "store", "checkpoint" or "reversible".
        control: of the drift, of mode "reversible".
        x: (N, C, *spatial); with squeezes (N, C / 2^d, *(2 spatial)).
        cond: what nets get besides, or None.
        squeezes: x is squeezed as it is read.

    Returns:
        z (N, C, *spatial) and log_det (N,), nats.
    """
    control = control if mode == "reversible" else None
    if squeezes and not len(x):  # torch's pixel_unshuffle, by which states are compared, leaves an empty one as it is
        x, squeezes = functional.squeeze(x), False
    positions = n_positions(x) // (2 ** (x.dim() - 2) if squeezes else 1)
    few = positions <= SKETCHED  # a sketch of such a state would be no smaller
    between = x.nbytes if few or control is None else x.nbytes // positions * SKETCHED
    nets_at = [0, *accumulate(form.tensors for form in steps.forms)]
    net_bytes = [sum([tensor.nbytes for tensor in steps.nets[at:end]]) for at, end in pairwise(nets_at)]
    limit = part_limit(x, net_bytes, between)
    units = steps.maps.bounds(net_bytes, limit, FOLDED_AT_ONCE)
    ends = [steps.maps.ends[end - 1] for _, end in units]
    whole = Whole(control, list(pairwise([0, *ends])), few)
    keeps = "checkpoint" if mode == "reversible" and whole.keeps_states else mode
    signs = _signs(positions, x) if keeps == "reversible" else None
    log_dets, way = [], _Way()
    for (first, end), part in zip(units, whole.parts, strict=True):
        raw, fold = steps.maps.of(first, end)
        forms, nets = steps.forms[part.first : part.end], steps.nets[nets_at[part.first] : nets_at[part.end]]
        whole.joins(part.first, x, (cond, *nets, *raw))
        squeezes_here = squeezes and part.index == 0
        watch = steps.watch
        form = require().Part(
            steps=forms,
            squeezes=squeezes_here,
            mode=require().Mode[keeps],
            anchors=part.anchors,
            knows_start=part.knows_start,
            signs=signs,
            watches=watch is not None,
        )
        node = _Node(part, keeps, forms, squeezes_here, form, fold, len(nets), steps.lowest, steps.precision, watch)
        with in_precision(steps.precision, x):
            x, log_det = apply_to_plain(_RunNode, node, way, x, cond, *nets, *raw)
        log_dets.append(log_det)
    return x, functional.summed(log_dets)


def run_plain(
    steps: Steps, x: Tensor, cond: Tensor | None, squeezes: bool, maps: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`run_recorded` does without a record, given the folded maps."""
    form = _keeps_nothing(steps.forms, squeezes, steps.watch is not None)
    with in_precision(steps.precision, x):
        found = require().run_forward(form, x, cond, maps, steps.nets)
    if steps.watch is not None:
        steps.watch(found.largest)
    return found.z, found.log_det


def run_inverse(steps: Steps, z: Tensor, cond: Tensor | None, inverses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute x and log|det dx/dz| without a record, given the inverses of the maps."""
    form = _keeps_nothing(steps.forms)
    with in_precision(steps.precision, z):
        found: tuple[Tensor, Tensor] = require().run_inverse(form, z, cond, inverses, steps.nets)
    return found


def folded_maps(steps: Steps) -> Sequence[Tensor]:
    """Fold the maps before all couplings: matrices, offsets, log_dets and, of gathers, indices."""
    raw, fold = steps.maps.of(0, len(steps.maps.ends))
    return fold(raw)


def inverted_maps(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Invert the matrices of folded maps; offsets and log_dets stay those of the maps."""
    found: Sequence[Tensor] = require().inverted(maps)
    return found
