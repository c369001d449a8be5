"""Bytes and work of nets, channel maps and runs of flow steps in a training step, by memory mode, from shapes alone.

A plan for a run of couplings is a pair of places 0 <= a <= b <= K: [0, a) run in mode "reversible", [a, b) in mode
"checkpoint", [b, K) in mode "store". Bytes are those of tensors beyond the parameters and their gradients; these are
there before the step, so that new ones exist a second time until they are added. What kernels and libraries take from
the system themselves is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

# Times in multiply-adds of a net, at the rate that nets have on a CPU: from the table of docs/speed.md, where they give
# for "checkpoint" and "reversible" over "store" 1.30 and 1.31 (a; measured 1.26 and 1.31), 1.26 and 1.32 (b; 1.08 and
# 1.13), 1.29 and 1.33 (c; 1.24 and 1.27), 1.30 and 1.30 (e; 1.32 and 1.33).
STEP_WORK = 32 * 10**6  # of a step besides its net: autograd, Python
INVERTED_STEP_WORK = 16 * 10**6  # what an inverted step takes more, with its check against drift
INVERTED_VALUE_WORK = 5  # and more for each byte of its state
RECOMPUTED_STEP_WORK = 8 * 10**6  # what a step takes more to be recomputed, besides its net
RECOMPUTED_RUN_WORK = 60 * 10**6  # and a run with any such steps, however few: the first step costs 2 to 3 ms (b, c)
STORED_BYTE_WORK = 8  # to write a net's activations to memory, and read them again
GRADIENTS_WORK = 3  # forward and backward of a net over its forward

# Memory of the maps that are folded together, as so many matrices, and vectors of a number for each channel, for each
# map: what autograd keeps of the folding; what folding and its derivative take for a moment; and, in a backward that
# inverts steps, the gradients and the inverses, which plain torch makes in float64.
FOLD_KEPT, FOLD_MAKING, FOLD_BACKWARD, FOLD_VECTORS = 5, 3, 4, 12
OPEN_MAPS, INVERTING = 2, 7
SQUEEZING = 5  # states, where a run's input is not squeezed as it is read
SMALL = 512  # bytes allowed for a few numbers by step, sample or channel, and for the allocator's rounding


@dataclass(frozen=True)
class ChunkCost:
    """Size of a net's largest chunk, in positions (times samples) that it reads and that it gives.

    ``work``: positions that all chunks read over those that they give, in thousandths.
    """

    taken: int
    given: int
    whole: bool
    work: int


@dataclass(frozen=True)
class NetCost:
    """Bytes and work of one net on a batch; "each" says that bytes are for one position of one sample of the state.

    Attributes:
        positions: samples times positions.
        hidden: bytes, each, that a run with a record keeps of the net's inside.
        margin: bytes that such a run keeps besides, in all.
        copied: bytes, each, of the net's input, where that is no view of the state.
        cloned: bytes, each, of copies of that for a net that may write to it; their gradients are those of its input.
        out: bytes, each, of the output.
        raw_out: bytes, each, of the net's own output, where the coupling takes a part of that; else 0.
        grad_inside: bytes, each, of gradients inside the net that are tensors.
        freed: bytes, each, of ``hidden`` that a recomputed net frees before its last gradients inside are there.
        grad_read: bytes, each, of the gradient of what the net reads of the state.
        grad_cond: bytes, each, of the gradient of the condition.
        params: bytes of the parameters that want gradients.
        made: bytes of weights that are made of the parameters.
        largest: bytes of the largest parameter.
        work: multiply-adds of the forward on the batch.
        chunk_for: gives how the batch is cut for a budget of the net's activations.
    """

    positions: int
    hidden: int
    out: int
    grad_read: int
    params: int
    work: int
    chunk_for: Callable[[str | int], ChunkCost]
    margin: int = 0
    copied: int = 0
    cloned: int = 0
    raw_out: int = 0
    grad_inside: int = 0
    grad_cond: int = 0
    freed: int = 0
    made: int = 0
    largest: int = 0

    @property
    def output(self) -> int:
        """The bytes of the output."""
        return self.positions * self.out

    @property
    def stored(self) -> int:
        """Count the bytes that a run with a record keeps, besides views of the state and the output."""
        return self.positions * (self.hidden + self.copied + self.cloned) + self.margin + self.made

    @property
    def grad_state(self) -> int:
        """Count the bytes of the gradient of what the net reads of the state."""
        return self.positions * self.grad_read

    @property
    def grads(self) -> int:
        """Count the bytes that all gradients of parameters take as they come."""
        return self.params + self.made

    @property
    def grads_inside(self) -> int:
        """Count the bytes, each, of gradients of tensors between the output and the state."""
        return self.raw_out + self.grad_inside + self.copied + self.grad_read + self.grad_cond

    def running(self, chunk: ChunkCost) -> int:
        """Count the most bytes while a chunk runs and gives its output, the output included."""
        inside = self.hidden + self.copied + self.cloned + self.out + self.raw_out
        return chunk.taken * inside + self.margin + self.made

    def going_back(self, chunk: ChunkCost) -> int:
        """Count the most bytes while a chunk that has run is differentiated; its output and the gradient included."""
        cropped = 0 if chunk.given == chunk.taken else self.out
        inside = self.hidden - self.freed + self.copied + self.cloned + self.out + cropped + self.grads_inside
        summing = 0 if chunk.whole else self.largest
        return chunk.taken * inside + chunk.given * self.out + self.margin + self.made + self.grads + summing


@dataclass(frozen=True)
class CouplingCost:
    """Cost of a coupling or injector with the channel map before it.

    Attributes:
        net: its net.
        matrix: bytes of the map's matrix, of a gather those of its scales.
        offset: bytes of its offset.
    """

    net: NetCost
    matrix: int
    offset: int


@dataclass(frozen=True)
class MapsCost:
    """Bytes of channel maps that are folded together.

    Attributes:
        kept: what autograd keeps since they were folded.
        making: what is needed beside ``kept`` while they are folded.
        back: what is needed beside ``kept`` while their gradients become those of the parameters.
        opened: what a backward that recomputes states keeps of them.
        inverting: what is needed beside ``opened`` while they are inverted.
        matrices: the maps themselves; their gradients take as many bytes again.
    """

    kept: int
    making: int
    back: int
    opened: int
    inverting: int
    matrices: int

    @classmethod
    def of(cls, couplings: Sequence[CouplingCost], given: bool = False) -> MapsCost:
        """Add up the maps before these couplings; of ``given`` ones, made before the run, only what their use takes."""
        matrices = sum(coupling.matrix for coupling in couplings)
        if given:
            return cls(0, 0, matrices, OPEN_MAPS * matrices, INVERTING * matrices, matrices)
        vectors = FOLD_VECTORS * sum(coupling.offset for coupling in couplings)
        kept = FOLD_KEPT * matrices + vectors
        kept += max(coupling.matrix for coupling in couplings)  # a unit matrix
        opened = kept + OPEN_MAPS * matrices
        making, back, inverting = (each * matrices for each in (FOLD_MAKING, FOLD_BACKWARD, INVERTING))
        return cls(kept, making + vectors, back + vectors, opened, inverting, matrices)


@dataclass(frozen=True)
class ChainPart:
    """Consecutive couplings first .. end - 1 that are one autograd function, counted among those recomputed together.

    Attributes:
        anchors: couplings but the first whose input is kept.
        knows_start: the input of the first is kept.
        opens, closes: the part is the last, the first of those whose channel maps are folded together.
        maps: how many these are.
    """

    first: int
    end: int
    anchors: tuple[int, ...]
    knows_start: bool
    opens: bool
    closes: bool
    maps: tuple[int, int]  # first, end


@dataclass(frozen=True)
class RunCost:
    """Cost of a run of couplings of one width in a training step.

    Attributes:
        couplings: in their order.
        state: bytes of a state.
        witness: bytes of its projections.
        places: (step, coupling) before which a plan may change the mode, ascending, both ends included.
        parts: of couplings first .. end - 1, keeping all states or not.
        first_entry: bytes that are kept where the run begins.
        entry: bytes of a state that is copied and kept where a mode begins, and copied back behind the last.
        behind: bytes of a channel map behind the last coupling, with the state before it.
        given: the channel maps are made before the run, and no one folds them again: first_entry has what they keep.
        squeezed: bytes that are copied to squeeze the run's input where that is not done as it is read; else 0.
        keeps_states: also in mode "reversible", whose anchors lie at every step: nothing is inverted.
    """

    couplings: tuple[CouplingCost, ...]
    state: int
    witness: int
    places: tuple[tuple[int, int], ...]
    parts: Callable[[int, int, bool], Sequence[ChainPart]]
    first_entry: int = 0
    entry: int = 0
    behind: int = 0
    given: bool = False
    squeezed: int = 0
    keeps_states: bool = False

    @cached_property
    def maps(self) -> Callable[[int, int], MapsCost]:
        """Add up the cost of the channel maps before couplings first .. end - 1."""
        return cache(lambda first, end: MapsCost.of(self.couplings[first:end], self.given))

    @cached_property
    def alike(self) -> list[tuple[int, int]]:
        """Find (first, one past the last) of the couplings around each one that cost the same."""
        ends = [k for k, (a, b) in enumerate(pairwise(self.couplings), 1) if a.net is not b.net or a.matrix != b.matrix]
        return [own for own in pairwise([0, *ends, len(self.couplings)]) for _ in range(*own)]

    def work(self, first: int, second: int, budget: str | int) -> int:
        """Estimate the time of forward and backward of a plan, in multiply-adds."""
        total = RECOMPUTED_RUN_WORK if second else 0
        for k, coupling in enumerate(self.couplings):
            net = coupling.net
            if k >= second:
                total += GRADIENTS_WORK * net.work + STORED_BYTE_WORK * net.stored + STEP_WORK
                continue
            total += (
                (GRADIENTS_WORK + 1) * net.work * net.chunk_for(budget).work // 1000 + STEP_WORK + RECOMPUTED_STEP_WORK
            )
            if k < first and not self.keeps_states:
                total += INVERTED_STEP_WORK + INVERTED_VALUE_WORK * self.state
        return total


@dataclass(frozen=True)
class PriorCost:
    """Cost of a term of the log-likelihood besides the log-dets, counted behind all runs.

    Attributes:
        kept: bytes from its forward until its backward.
        forward, backward: the most besides, in each.
        gradient: of latents, held from its backward until that of the run that made them.
    """

    kept: int
    forward: int
    backward: int
    gradient: int


@dataclass(frozen=True)
class JoinCost:
    """Cost of what lies behind a run, where gradients of parts of its output become one.

    Attributes:
        gradients: bytes held of gradients of parts of the run's output, which become one.
        joining: the most that this takes, the result included.
    """

    gradients: int
    joining: int


@dataclass(frozen=True)
class RestCost:
    """Cost of all of the model that is not in its runs.

    Attributes:
        base: bytes that are there all the time.
        joins: behind each run.
        priors: in the order of the forward.
    """

    base: int
    joins: tuple[JoinCost, ...]
    priors: tuple[PriorCost, ...]
