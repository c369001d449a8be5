"""Drift of recomputed states: how far they are from the true ones, and what is done about it.

Inverting a step amplifies rounding, so a state recomputed over many steps drifts. Stored states (anchors) restart the
recomputation, and each tells the exact drift of its segment. In between, every step has kept an N x C projection of its
state on random signs: a recomputed state is held against it. A segment that drifts beyond the tolerance is redone from
its anchor by checkpointing, and the anchors move closer for the passes that follow; while it stays far below, they move
apart. Between two anchors csrc/run hands gradients out part by part: what ends a part is held against a sketch, some
more of these projections, which tells an error's size nearly as well as the true state would.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast._core import float32
from pyglow_fast._core.captures import can_capture, made_once
from pyglow_fast._core.errors import expect
from pyglow_fast._core.float32 import CONVOLUTIONS, PRODUCTS
from pyglow_fast._core.torch_private import backward_id
from pyglow_fast.reference import flat_positions, full_precision
from pyglow_fast.runs.deferred import Verdicts

START_SPACING, MOST_ANCHORS = 4, 12  # anchors are 4 steps apart at first, or farther so that they are at most 12
# The projection of an error on random signs is its norm times about a standard normal number, of which many are drawn.
PROJECTION_SLACK = 4.0
# Projections of a sketch. An error twice as large as allowed, in one channel of one sample and nowhere else, passes 9
# times in 100, one four times as large once in 140; an inverted step spreads what errors there are over its channels.
SKETCHED = 4
BLOCK, LEAST_BLOCK = 1024, 32  # positions that are summed in one go; all, if their number has no divisor between
LEAST_EPS, EPS_PER_ROOT, MOST_EPS, NET_EPS = 16.0, 6.0, 32.0, 4.0  # see docs/memory-derivation.md
# The spacing doubles where drift is below this part of the tolerance: roundings of independent steps add up as squares,
# so that drift over twice as many steps is 1.4 times as large (measured: 1.35 to 1.5 for each doubling from 8 to 256
# steps), and twice as large where each step amplifies those before it.
GROW_BELOW = 0.5
GROW_AFTER = 4  # passes in a row
FIRST_HOLD, LAST_HOLD = 32, 1024  # passes until a spacing that drifted is tried again, doubled each time
WINDOW = 64  # passes over which redone steps are counted for the warning
FREQUENT = 0.25  # of the steps
# An error is measured against the norm of its own channel, so that a small channel cannot hide behind large ones; but
# not below this part of the largest, since a channel of nothing but rounding is no state. From latents to data a map
# comes last: what it gives is no better in a small channel than roundings of the largest, and latents are often zeros
# in some channels (what was lost, means of a prior). From data on, a small channel's actnorm may make it large.
FLOOR, FLOOR_BACK = 1e-6, 0.25


def default_tolerance(state: torch.dtype, n_steps: int = 1, lowest: torch.dtype | None = None) -> float:
    """Choose the largest drift of a state whose gradients are as good as stored ones; see docs/memory-derivation.md.

    Behind K steps a stored state is off by about sqrt(K) roundings itself. Outputs of nets that compute in a lower
    dtype do not repeat better than to its eps; TF32 counts as float16, which has as many bits.
    """
    if lowest is not None and torch.finfo(lowest).eps > torch.finfo(state).eps:
        return NET_EPS * torch.finfo(lowest).eps
    stored: float = min(max(LEAST_EPS, EPS_PER_ROOT * n_steps**0.5), MOST_EPS)
    return stored * torch.finfo(state).eps


def lowest_precision(dtype: torch.dtype, net_out: Tensor, weights: Sequence[Tensor] = ()) -> torch.dtype:
    """Find the lowest of a dtype, that of a net's output, and that of autocast if it is on.

    Of a net on a GPU also that which the settings of the moment let products with its weights round to: convolutions
    have weights (C_out, C_in, ...), linear layers (C_out, C_in). TF32 counts as float16, which has as many bits.
    """
    found = {dtype, net_out.dtype}
    device_type = net_out.device.type
    if float32.autocast_is_on(device_type):
        found.add(torch.get_autocast_dtype(device_type))
    if weights and float32.has_tf32(net_out):
        operations = {PRODUCTS if weight.dim() == 2 else CONVOLUTIONS for weight in weights if weight.dim() >= 2}
        found |= {torch.float16 for operation in operations if float32.rounds(operation, net_out)}
    return lowest_of(*found)


def lowest_of(*dtypes: torch.dtype) -> torch.dtype:
    """Find the dtype that rounds most."""
    return dtypes[0] if len(dtypes) == 1 else max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class Signs(NamedTuple):
    """Random signs of positions in blocks of equal length, inner[p % length] outer[p // length], and their sum.

    Those of a sketch, SKETCHED at once, are of the same form: inner (length, SKETCHED), outer (blocks, SKETCHED).
    """

    inner: Tensor
    outer: Tensor
    sum: float | Tensor


@made_once(16)
def signs_of(positions: int, dtype: torch.dtype, device: torch.device) -> tuple[Signs, Signs]:
    """Draw signs for a number of positions, and those of a sketch."""
    generator = torch.Generator("cpu").manual_seed(positions)
    length = next((n for n in range(min(BLOCK, positions), LEAST_BLOCK, -1) if positions % n == 0), positions)
    inner, outer = (
        torch.randint(2, (1 + SKETCHED, n), generator=generator, device="cpu") * 2 - 1
        for n in (length, positions // max(length, 1))
    )
    outer = outer if outer.shape[1] > 1 else torch.ones_like(outer)
    sums = inner.sum(1) * outer.sum(1)

    def moved(part: Tensor) -> Tensor:
        return part.to(device, dtype).contiguous()

    sketched = Signs(moved(inner[1:].T), moved(outer[1:].T), moved(sums[1:]))
    return Signs(moved(inner[0]), moved(outer[0]), float(sums[0])), sketched


def project(x: Tensor) -> Tensor:
    """Project x on random signs: the sum over its positions of sign x, per sample and channel, (N, C).

    Block by block: the rounding of one long sum, relative to the norm, grows with the root of its length, and would be
    taken for drift at high resolution.
    """
    flat = flat_positions(x)
    signs, _ = signs_of(flat.shape[2], x.dtype, x.device)
    by_block = flat.unflatten(2, (signs.outer.shape[0], signs.inner.shape[0]))
    if float32.rounds(PRODUCTS, x):  # of single numbers, which nothing rounds
        one_by_one: Tensor = ((by_block * signs.inner).sum(3) * signs.outer).sum(2)
        return one_by_one
    with full_precision(x):
        products: Tensor = (by_block @ signs.inner) @ signs.outer
        return products


def norms(x: Tensor) -> Tensor:
    """Compute the Euclidean norm over the positions, per sample and channel: (N, C)."""
    norm: Tensor = torch.linalg.vector_norm(flat_positions(x), dim=2)
    return norm


def _scale(norm: Tensor, inverse: bool) -> Tensor:
    """Compute the norm that an error is divided by, (..., N, C), from the norms of states."""
    if norm.numel() == 0:
        return norm
    # A sample's norm of a channel may be small by chance (a single position): not below the batch's typical one, which
    # a single large sample does not change.
    # (The lower median, as torch.median gives it, which is refused on CUDA under use_deterministic_algorithms.)
    typical = norm.sort(dim=-2).values.narrow(-2, (norm.shape[-2] - 1) // 2, 1)
    floor = ((FLOOR_BACK if inverse else FLOOR) * typical.amax(dim=-1, keepdim=True)).clamp_min(
        torch.finfo(norm.dtype).tiny
    )
    return norm.maximum(typical.maximum(floor))


def _largest(error: Tensor, scale: Tensor) -> Tensor:
    """The largest |error| / scale; error is overwritten."""
    return torch.linalg.vector_norm(error.div_(scale), torch.inf) if error.numel() else error.new_zeros(())


def projected_drift(x: Tensor, seen: Tensor, inverse: bool = False) -> Tensor:
    """The largest relative error of a recomputed state, by the projections ``seen`` (N, C) of the true one.

    Returns a scalar tensor, NaN if x is. Errors are measured against the norms of x itself: where x is so far off that
    its norms are wrong too, the error is as large as they are, beyond any tolerance.
    """
    return _largest(project(x) - seen, _scale(norms(x), inverse).mul_(PROJECTION_SLACK))


def anchor_drift(recomputed: Tensor, true: Tensor, inverse: bool = False) -> Tensor:
    """The largest relative error of a recomputed state over samples and channels; a scalar tensor, NaN if it is."""
    return _largest(norms(recomputed - true), _scale(norms(true), inverse))


@dataclass
class DriftRecord:
    """Findings of earlier passes, which are all that decides the next ones.

    Checkpoints have it as a vector, in which the order of the fields is that of the numbers.
    """

    spacing: int  # of the anchors, where it is "auto"
    calm: int = 0  # passes in a row far below the tolerance
    hold: int = 0  # passes until a spacing that drifted is tried again
    next_hold: int = FIRST_HOLD
    passes: int = 0
    trips: int = 0  # passes in which a state drifted
    redone_steps: int = 0
    skipped: int = 0  # passes whose gradients became zero
    last_drift: float = 0.0
    largest_drift: float = 0.0
    recent_redone: float = 0.0  # share of the steps, over about WINDOW passes


class DriftControl:
    """Adapts the spacing of one run's anchors (stored states) from pass to pass, by the drift that was seen.

    The options are those of :class:`~pyglow_fast.ReversibleSequence`. With ``leaves_out`` gradients of a pass whose
    verdict is deferred stay as they are where a state has drifted: whoever sets it for the pass reads :meth:`zeroed`,
    and leaves its update out.
    """

    def __init__(
        self,
        n_steps: int,
        anchor_every: str | int | None = "auto",
        tolerance: float | None = None,
        deferred: bool = False,
    ) -> None:
        fixed = isinstance(anchor_every, int) and not isinstance(anchor_every, bool) and anchor_every >= 1
        known = fixed or anchor_every in ("auto", None)
        expect(known, "anchor_every", '"auto", None or a positive int', repr(anchor_every))
        number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool) and tolerance > 0
        expect(tolerance is None or number, "tolerance", "None or a positive number", repr(tolerance))
        expect(isinstance(deferred, bool), "deferred_check", "a bool", repr(deferred))
        self.n_steps, self.anchor_every, self.tolerance, self.deferred = n_steps, anchor_every, tolerance, deferred
        most = max(n_steps, 1)
        start = min(max(START_SPACING, -(-n_steps // MOST_ANCHORS)), most)
        self.first_spacing = anchor_every if isinstance(anchor_every, int) else most if anchor_every is None else start
        self.verdicts, self.leaves_out, self._has_warned = Verdicts(), False, False
        self.learnt = DriftRecord(start)
        self._began_with: int | None = None  # the learnt spacing, at the last forward outside of a backward

    @property
    def spacing(self) -> int:
        """The number of steps from one anchor to the next in a forward pass that begins now."""
        if self.anchor_every != "auto":
            return self.first_spacing
        return self._began_with if backward_id() != -1 and self._began_with is not None else self.learnt.spacing

    def begin(self) -> None:
        """Take in, before a forward pass, the verdicts that are known by now.

        A forward inside a backward may repeat one from before for torch.utils.checkpoint, which asks for the same
        anchors. So it has those of the last forward outside of a backward, whatever has been learnt since. If that was
        another forward than the one that is repeated, and the spacing another, torch refuses the backward.
        """
        if backward_id() != -1 and self._began_with is not None:
            return
        self.settle()
        if backward_id() == -1:
            self._began_with = self.learnt.spacing

    def limit(self, state: torch.dtype, lowest: torch.dtype | None = None) -> float:
        """Give the tolerance for states of that dtype between nets that compute in ``lowest``."""
        if self.tolerance is not None:
            return float(self.tolerance)
        return default_tolerance(state, self.n_steps, lowest)

    @property
    def checkpoints(self) -> bool:
        """Whether every step has an anchor now, so that no state is recomputed from its output."""
        return self.n_steps > 1 and self.spacing == 1

    def anchors(self) -> list[int]:
        """List the steps (but for the first) whose input is stored in a forward pass that begins now."""
        return list(range(self.spacing, self.n_steps, self.spacing))

    def prepare(self, device: torch.device) -> None:
        """Make the counters for the verdict of a pass on a device that may be deferred, before the pass."""
        if self.deferred or can_capture(device):
            self.verdicts.prepare(device)

    def zeroed(self, device: torch.device) -> Tensor | None:
        """The number of passes whose gradients were set to zero on a device, where it is counted: a scalar tensor.

        The host is not to wait for it, and a graph's replay changes it.
        """
        found = self.verdicts.values
        return None if found is None or found.device != device else found[2]

    def settle(self, wait: bool = False) -> None:
        """Take in the verdict of an earlier pass if it is known by now, or wait for it."""
        if self.verdicts.values is None:  # no pass was deferred
            return
        for drift, limit, spacing, drifted, zeroed in self.verdicts.take(wait):
            self.record(drift, limit, 0, spacing, drifted, zeroed)

    def record_checkpointed(self) -> None:
        """Note a backward pass that kept every state: after some of them a wider spacing is tried again."""
        with self.verdicts.lock:
            learnt = self.learnt
            learnt.passes += 1
            learnt.recent_redone -= learnt.recent_redone / min(learnt.passes, WINDOW)
            learnt.hold = max(0, learnt.hold - 1)
            if self.anchor_every == "auto" and learnt.hold == 0:
                learnt.spacing = min(2, self.n_steps)

    def record(
        self,
        drift: float,
        limit: float,
        redone: int,
        spacing: int,
        drifted: bool = False,
        skipped: bool = False,
    ) -> None:
        """Note a backward pass: the worst drift seen, the steps that were redone, the spacing it ran with.

        With deferred verdicts: whether a state drifted, and whether the gradients became zero (by any run's drift).
        """
        with self.verdicts.lock:
            learnt = self.learnt
            learnt.passes += 1
            learnt.last_drift = drift
            learnt.largest_drift = max(learnt.largest_drift, drift) if drift == drift else float("nan")
            learnt.redone_steps += redone
            lost = 1.0 if skipped else redone / max(self.n_steps, 1)
            learnt.recent_redone += (lost - learnt.recent_redone) / min(learnt.passes, WINDOW)
            learnt.skipped += skipped
            learnt.trips += bool(redone) or drifted
            self._adapt(drift, limit, bool(redone) or drifted, spacing)
            frequent = learnt.recent_redone > FREQUENT and learnt.passes >= WINDOW // 4
            if frequent and not self._has_warned:
                self._has_warned = True
                what = "lost, with all gradients," if skipped else "redone from their anchors"
                warnings.warn(
                    f"reversible backward: {100 * learnt.recent_redone:.0f} % of the steps are {what}, "
                    f"since recomputed states drift (last: {drift:.1e}, tolerance {limit:.1e}). "
                    'memory="checkpoint" costs no more time then; '
                    "a larger scale_eps or clamp keeps steps well invertible",
                    stacklevel=2,
                )

    def _adapt(self, drift: float, limit: float, tripped: bool, spacing: int) -> None:
        learnt = self.learnt
        learnt.hold = max(0, learnt.hold - 1)
        if tripped:
            learnt.calm = 0
            if spacing <= learnt.spacing:  # else a pass that began before the last adaptation
                # The spacing of this pass is halved: a graph keeps its own while calm replays widen the learnt one.
                learnt.spacing = max(1, spacing // 2)
                learnt.hold, learnt.next_hold = learnt.next_hold, min(2 * learnt.next_hold, LAST_HOLD)
            return
        if spacing < learnt.spacing:
            return  # that a pass with closer anchors is calm says nothing about wider ones
        learnt.calm = learnt.calm + 1 if drift <= GROW_BELOW * limit else 0
        wider = min(2 * learnt.spacing, max(self.n_steps, 1))
        if learnt.calm >= GROW_AFTER and wider > learnt.spacing and learnt.hold == 0:
            learnt.spacing, learnt.calm = wider, 0

    def report(self) -> dict[str, Any]:
        """Report spacing of the anchors, drift, and what was redone or skipped so far."""
        self.settle(wait=True)
        shown = ("passes", "last_drift", "largest_drift", "trips", "redone_steps", "skipped")
        return {"anchor_every": self.spacing} | {name: getattr(self.learnt, name) for name in shown}

    def reports(self, inverse: DriftControl) -> dict[str, Any]:
        """Report of both directions: that of the inverse, if it ever went back, under "inverse"."""
        back = inverse.report()
        return self.report() | ({"inverse": back} if back["passes"] else {})

    def state(self) -> Tensor:
        """Pack all that decides the next passes into a float64 vector, to be saved in checkpoints."""
        self.settle(wait=True)
        return torch.tensor(astuple(self.learnt), dtype=torch.float64)

    def load_state(self, state: Tensor) -> None:
        """Continue from a saved state, of a run of any depth; what is none is refused.

        Drift in it may be infinite or NaN: states that were not finite have such.
        """
        own = fields(DriftRecord)
        is_vector = isinstance(state, Tensor) and state.shape == (len(own),)
        found = getattr(state, "shape", type(state).__name__)
        expect(is_vector, "drift control state", f"{len(own)} numbers", found)
        values = state.double().tolist()
        for k, (item, value) in enumerate(zip(own, values, strict=True)):
            if item.type == "int":
                whole = value >= 0 and value.is_integer()
                expect(whole, f"drift control state: {item.name}", "a whole number, 0 or more", value)
                values[k] = int(value)
        self.settle(wait=True)  # verdicts of passes before belong to the old record
        self.learnt = DriftRecord(*values)
        self.learnt.spacing = max(1, min(self.learnt.spacing, max(self.n_steps, 1)))
