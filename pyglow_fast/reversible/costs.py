"""Bytes and work of a training step through runs of flow steps, by memory mode, from shapes alone.

A plan for a run of couplings is a pair of places 0 <= a <= b <= K: [0, a) run in mode "reversible", [a, b) in mode
"checkpoint", [b, K) in mode "store". Bytes are those of tensors beyond the parameters and their gradients; these are
there before the step, so that new ones exist a second time until they are added. What kernels and libraries take from
the system themselves is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyglow_fast.reversible.drift import SKETCHED

# Times in multiply-adds of a net, at the rate that nets have on a CPU: from the table of docs/speed.md, where they give
# for "checkpoint" and "reversible" over "store" 1.29 and 1.30 (a; measured 1.26 and 1.31), 1.23 and 1.29 (b; 1.08 and
# 1.13), 1.22 and 1.27 (c; 1.24 and 1.27), 1.29 and 1.30 (e; 1.32 and 1.33).
STEP_WORK = 32 * 10**6  # of a step besides its net: autograd, Python
INVERTED_STEP_WORK = 16 * 10**6  # what it takes more to be inverted and witnessed
INVERTED_VALUE_WORK = 5  # the same for each byte of the state
STORED_BYTE_WORK = 8  # to write a net's activations to memory, and read them again
GRADIENTS_WORK = 3  # forward and backward of a net over its forward

# Of the maps that are folded together, in matrices and in vectors of as many numbers as there are channels, each: what
# autograd keeps of their making, and what that and its derivative take for a moment. In a backward that inverts steps
# also gradients and inverses, which are made in float64.
FOLD_KEPT, FOLD_MAKING, FOLD_BACKWARD, FOLD_VECTORS = 5, 3, 4, 12
OPEN_MAPS, INVERTING = 2, 7
SQUEEZING = 5  # states, where a run's input is not squeezed as it is read
SMALL = 512  # bytes of numbers by step, sample or channel that are too few to be told apart; the allocator's rounding


@dataclass(frozen=True)
class ChunkCost:
    """The largest chunk of a net, in positions (times samples) that it reads and that it gives.

    ``work``: positions that all chunks read over those that they give, in thousandths.
    """

    taken: int
    given: int
    whole: bool
    work: int


@dataclass(frozen=True)
class NetCost:
    """Bytes and work of one net on a batch; what is "each" is by position and sample of the state.

    Attributes:
        positions: samples times positions.
        hidden: bytes, each, that a run with a record keeps of the net's inside.
        margin: the same, in all, besides.
        copied: each, of what the net reads, where that is no view.
        out: each, of the output.
        raw_out: each, of the output as the net itself gives it where the coupling takes a part of that; else 0.
        grad_inside: each, of gradients inside the net that are tensors.
        grad_read: each, of the gradient of what it reads of the state.
        grad_cond: each, of that of the condition.
        params: of the parameters that want gradients.
        made: of weights that are made of the parameters.
        largest: of one parameter, the most.
        work: multiply-adds of the forward on the batch.
        chunk_for: how the batch is cut for a budget of the net's activations.
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
    raw_out: int = 0
    grad_inside: int = 0
    grad_cond: int = 0
    made: int = 0
    largest: int = 0

    @property
    def output(self) -> int:
        """Bytes of the output."""
        return self.positions * self.out

    @property
    def stored(self) -> int:
        """Bytes that a run with a record keeps, besides views of the state and the output."""
        return self.positions * (self.hidden + self.copied) + self.margin + self.made

    @property
    def grad_state(self) -> int:
        """Bytes of the gradient of what is read of the state."""
        return self.positions * self.grad_read

    @property
    def grads(self) -> int:
        """Bytes that all gradients of parameters take as they come."""
        return self.params + self.made

    @property
    def grads_inside(self) -> int:
        """Bytes of gradients of tensors between the output and the state, each."""
        return self.raw_out + self.grad_inside + self.copied + self.grad_read + self.grad_cond

    def running(self, chunk: ChunkCost) -> int:
        """The most bytes while a chunk runs and gives its output, the output included."""
        inside = self.hidden + self.copied + self.out + self.raw_out
        return chunk.taken * inside + self.margin + self.made

    def going_back(self, chunk: ChunkCost) -> int:
        """The most bytes while a chunk, which has run, is differentiated; its output and the gradient included."""
        cropped = 0 if chunk.given == chunk.taken else self.out
        inside = self.hidden + self.copied + self.out + cropped + self.grads_inside
        summing = 0 if chunk.whole else self.largest
        return chunk.taken * inside + chunk.given * self.out + self.margin + self.made + self.grads + summing


@dataclass(frozen=True)
class CouplingCost:
    """A coupling or injector with the channel map before it.

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
        kept: by autograd, of their making.
        making: beside that, while they are made.
        back: the same, while their gradients become those of what they are made of.
        opened: kept in a backward that recomputes states.
        inverting: beside that, while they are inverted.
    """

    kept: int
    making: int
    back: int
    opened: int
    inverting: int

    @classmethod
    def of(cls, couplings: Sequence[CouplingCost], given: bool = False) -> MapsCost:
        """Of the maps before these; of given ones, which were made before the run, only what their use takes."""
        matrices = sum(coupling.matrix for coupling in couplings)
        if given:
            return cls(0, 0, matrices, OPEN_MAPS * matrices, INVERTING * matrices)
        kept = FOLD_KEPT * matrices + FOLD_VECTORS * sum(coupling.offset for coupling in couplings)
        kept += max(coupling.matrix for coupling in couplings)  # a unit matrix
        opened = kept + OPEN_MAPS * matrices
        return cls(kept, FOLD_MAKING * matrices, FOLD_BACKWARD * matrices, opened, INVERTING * matrices)


@dataclass(frozen=True)
class ChainPart:
    """Couplings first .. end - 1, counted within what is recomputed together, as one autograd function.

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
    """What a run of couplings of one width costs.

    Attributes:
        couplings: in their order.
        state: bytes of a state.
        witness: bytes of its projections.
        places: (step, coupling) before which a plan may change the mode, ascending, both ends included.
        parts: of couplings first .. end - 1, keeping all states or not.
        first_entry: bytes that are kept where the run begins.
        entry: bytes that are copied and kept where a mode begins.
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

    def maps(self, first: int, end: int) -> MapsCost:
        """The cost of the channel maps before couplings first .. end - 1."""
        return MapsCost.of(self.couplings[first:end], self.given)

    def work(self, first: int, second: int, budget: str | int) -> int:
        """The time of forward and backward of the plan, in multiply-adds."""
        total = 0
        for k, coupling in enumerate(self.couplings):
            net = coupling.net
            if k >= second:
                total += GRADIENTS_WORK * net.work + STORED_BYTE_WORK * net.stored + STEP_WORK
                continue
            total += (GRADIENTS_WORK + 1) * net.work * net.chunk_for(budget).work // 1000 + STEP_WORK
            if k < first and not self.keeps_states:
                total += INVERTED_STEP_WORK + INVERTED_VALUE_WORK * self.state
        return total


class Meter:
    """Bytes that are held now, and the most so far."""

    def __init__(self, now: int = 0) -> None:
        self.now = self.most = now

    def hold(self, size: int) -> None:
        """So many more, or less, from now on."""
        self.now += size
        self.most = max(self.most, self.now)

    def touch(self, size: int) -> None:
        """So many more for a moment."""
        self.most = max(self.most, self.now + size)


@dataclass(frozen=True)
class RunBytes:
    """The bytes of a run by a plan, beyond those of all others.

    Attributes:
        kept: from its forward until its backward, its output included.
        forward: the most in the forward.
        backward: the most in the backward, what is kept and the gradient of the output included.
    """

    kept: int
    forward: int
    backward: int


def bytes_of(run: RunCost, first: int, second: int, budget: str | int) -> RunBytes:
    """The bytes of a plan: couplings [0, first) reversible, [first, second) checkpointed, the others stored."""
    count = len(run.couplings)
    ahead, back = Meter(), Meter()
    spans = [(0, first, "reversible"), (first, second, "checkpoint"), (second, count, "store")]
    spans = [span for span in spans if span[0] < span[1]]
    for begin, end, mode in spans:
        ahead.hold(run.entry + (0 if begin else run.first_entry))
        if mode == "store":
            _store_forward(run, begin, end, ahead)
        else:
            _chain_forward(run, begin, end, run.keeps_states or mode == "checkpoint", budget, ahead)
    ahead.hold(run.behind)
    back.hold(ahead.now + run.state)  # the gradient of the output
    if run.behind:
        back.touch(run.state)
        back.hold(-run.behind)
    for begin, end, mode in reversed(spans):
        if mode == "store":
            _store_backward(run, begin, end, back)
        else:
            _chain_backward(run, begin, end, run.keeps_states or mode == "checkpoint", budget, back)
        back.hold(-run.entry)
        if run.given:  # gradients of the maps, with which what they were made of gets its own in the end
            back.hold(sum(coupling.matrix for coupling in run.couplings[begin:end]))
        elif not begin:
            back.hold(-run.first_entry)
    if run.given:
        back.touch(FOLD_BACKWARD * max(coupling.matrix for coupling in run.couplings))
    return RunBytes(ahead.now, ahead.most, back.most)


def _store_forward(run: RunCost, begin: int, end: int, meter: Meter) -> None:
    """Keeps u, the net's inside and its output of every coupling; and the output."""
    own, maps = run.couplings[begin:end], run.maps(begin, end)
    meter.hold(maps.kept + (0 if begin else run.squeezed))
    meter.touch(maps.making)
    for coupling in own:
        net = coupling.net
        meter.hold(run.state)
        meter.touch(net.stored + net.output + net.positions * net.raw_out)
        meter.hold(net.stored + net.output + SMALL)
    meter.hold(run.state)


def _store_backward(run: RunCost, begin: int, end: int, meter: Meter) -> None:
    """From the gradient of the output, which is held, to that of the input, which is held in its place."""
    own = run.couplings[begin:end]
    maps, of_maps = run.maps(begin, end), 0
    for k in reversed(range(len(own))):
        net, state = own[k].net, run.state
        meter.touch(state + net.output)
        # The output, or the map behind it, is done with; its gradients are there for those of u and of the net.
        freed = state if k + 1 == len(own) else own[k + 1].net.grad_state
        meter.hold(-freed)
        meter.touch(net.positions * net.grads_inside + net.grads)
        # u, what the net has kept, the output and its gradient.
        meter.hold(net.grad_state - state - net.stored - net.output - SMALL)
        meter.hold(own[k].matrix)
        of_maps += own[k].matrix
    meter.touch(run.state)
    meter.hold(-own[0].net.grad_state)
    meter.touch(maps.back)
    meter.hold(-of_maps - maps.kept - (0 if begin else run.squeezed))


def _chain_forward(run: RunCost, begin: int, end: int, keeps_states: bool, budget: str | int, meter: Meter) -> None:
    """Keeps the output, and by coupling its state or a witness; anchors; what tells a part its start."""
    for part in run.parts(begin, end, keeps_states):
        maps = run.maps(begin + part.maps[0], begin + part.maps[1])
        for k in range(part.first, part.end):
            net = run.couplings[begin + k].net
            chunk = net.chunk_for(budget)
            # u, the output whole and of the chunk, and the next state.
            gathered = 0 if chunk.whole else net.output
            running = net.running(chunk) - chunk.taken * net.hidden + gathered
            meter.touch(maps.making + 2 * run.state + max(running, run.state + net.output))
            meter.hold(run.state if keeps_states else run.witness)
        meter.hold(run.state * len(part.anchors))
        if part.first > 0:
            meter.hold(run.state if part.knows_start and (keeps_states or part.first) else SKETCHED * run.witness)
        meter.hold(SMALL)
    meter.hold(run.state)


def _chain_backward(run: RunCost, begin: int, end: int, keeps_states: bool, budget: str | int, meter: Meter) -> None:
    """From the gradient of the output to that of the input, in its place; part by part, all of one freed at its end."""
    parts = run.parts(begin, end, keeps_states)
    state = run.state
    if keeps_states:
        meter.hold(-state)  # nothing of this run asks for the output
    for part in reversed(parts):
        maps = run.maps(begin + part.maps[0], begin + part.maps[1])
        last = part.end == end - begin
        if part.opens:
            meter.touch(maps.making)
            meter.hold(maps.opened)
            meter.touch(0 if keeps_states else maps.inverting)
        start = 0 if last or keeps_states else state  # the output, as the part behind has recomputed it
        meter.hold(start)
        back = _differentiated if keeps_states else _inverted
        grads = back(run, begin, part, budget, meter)
        if part.closes:
            meter.touch(maps.back)
            meter.hold(-maps.opened)
        meter.hold(-start - grads)
        meter.hold(-(state if keeps_states else run.witness) * (part.end - part.first))
        meter.hold(-state * len(part.anchors) - SMALL)
        if part.first > 0:
            meter.hold(-(state if part.knows_start else SKETCHED * run.witness))
        if last and not keeps_states:
            meter.hold(-state)


def _inverted(run: RunCost, begin: int, part: ChainPart, budget: str | int, meter: Meter) -> int:
    """Bytes of the gradients of a part's nets, held; its steps inverted, segment by segment between the anchors."""
    state, grads = run.state, 0
    starts = [part.first, *part.anchors]
    ends = [*part.anchors, part.end]
    for segment in reversed(range(len(starts))):
        before = 0 if segment + 1 == len(starts) else state  # the gradient with which a segment may be redone
        meter.hold(before)
        for k in reversed(range(starts[segment], ends[segment])):
            net = run.couplings[begin + k].net
            chunk = net.chunk_for(budget)
            inner = 0 if k + 1 == ends[segment] else 2 * state  # y and its gradient, recomputed
            meter.hold(inner)
            # The step's input and the gradient of u come chunk by chunk into tensors of the whole.
            of_chunk = chunk.given * 2 * state // max(net.positions, 1)
            gathered = 0 if chunk.whole else 2 * state + net.grad_state + net.grads
            meter.touch(gathered + of_chunk + net.running(chunk) + chunk.given * net.out)
            meter.touch((gathered or 2 * state) + net.going_back(chunk))
            meter.touch(2 * state + net.grad_state + net.params + state)
            meter.touch(net.params + 3 * state)  # the drift from the true input
            if begin + k == 0:
                meter.touch(2 * state + net.grad_state + net.params + max(2 * state, SQUEEZING * run.squeezed))
            meter.hold(net.params - inner)
            grads += net.params
        meter.hold(-before)
    return grads


def _differentiated(run: RunCost, begin: int, part: ChainPart, budget: str | int, meter: Meter) -> int:
    """Bytes of the gradients of a part's nets, held; its steps differentiated from their states."""
    state, grads = run.state, 0
    for k in reversed(range(part.first, part.end)):
        net = run.couplings[begin + k].net
        chunk = net.chunk_for(budget)
        last = k + 1 == part.end
        held = 0 if last else state + run.couplings[begin + k + 1].net.grad_state
        meter.hold(held)
        each = state // max(net.positions, 1)
        of_chunk = chunk.given * each * (2 if last else 1)  # the gradient of u, and once the output
        gathered = 0 if chunk.whole else state + net.grad_state + net.grads
        meter.touch(gathered + of_chunk + net.running(chunk) + chunk.given * net.out)
        meter.touch((gathered or state) + net.going_back(chunk))
        meter.hold(net.params - held)
        grads += net.params
    squeezing = SQUEEZING * run.squeezed if begin + part.first == 0 else 0
    meter.touch(2 * state + run.couplings[begin + part.first].net.grad_state + squeezing)
    return grads


@dataclass(frozen=True)
class PriorCost:
    """A term of the log-likelihood besides the log-dets, counted behind all runs.

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
    """What lies behind a run.

    Attributes:
        gradients: bytes held of gradients of parts of the run's output, which become one.
        joining: the most that this takes, the result included.
    """

    gradients: int
    joining: int


@dataclass(frozen=True)
class RestCost:
    """The model but for its runs.

    Attributes:
        base: bytes that are there all the time.
        joins: behind each run.
        priors: in the order of the forward.
    """

    base: int
    joins: tuple[JoinCost, ...]
    priors: tuple[PriorCost, ...]


def peak(runs: Sequence[RunBytes], rest: RestCost) -> int:
    """The most bytes of a step: all runs forward, the priors, then back in the opposite order."""
    meter = Meter(rest.base)
    for run in runs:
        meter.touch(run.forward)
        meter.hold(run.kept)
    for prior in rest.priors:
        meter.touch(prior.forward)
        meter.hold(prior.kept)
    for prior in reversed(rest.priors):
        meter.touch(prior.backward)
        meter.hold(prior.gradient - prior.kept)
    for run, join in zip(reversed(runs), reversed(rest.joins), strict=True):
        meter.touch(join.joining)
        meter.hold(-join.gradients - run.kept)
        meter.touch(run.backward)
    return meter.most
