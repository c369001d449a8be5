"""Timeline of what is alive in a training step, its runs forward and back: holds and releases of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from pyglow_fast.reversible.costs import FOLD_BACKWARD, SMALL, SQUEEZING, ChainPart, RestCost, RunCost
from pyglow_fast.reversible.drift import SKETCHED

MEASURES = 2  # of a recomputed state, each as large as a witness: they wait until a segment is judged


class Meter:
    """Counts bytes that are held now, and the most so far."""

    def __init__(self, now: int = 0) -> None:
        self.now = self.most = now

    def hold(self, size: int) -> None:
        """Hold so many bytes more, or less, from now on."""
        self.now += size
        self.most = max(self.most, self.now)

    def touch(self, size: int) -> None:
        """Count so many bytes more for a moment."""
        self.most = max(self.most, self.now + size)

    def walk(self, run: RunCost, order: range, step: Callable[[int], None]) -> None:
        """Call step(k) for consecutive couplings of a run, ascending or descending.

        Of couplings that cost the same only the first, the second and the last are called: each of the others holds
        what the one before it has held.
        """
        k = 0
        while k < len(order):
            first, end = run.alike[order[k]]
            count = min(end - order[k] if order.step > 0 else order[k] - first + 1, len(order) - k)
            step(order[k])
            before = self.now
            if count > 1:
                step(order[k + 1])
            if count > 2:
                self.now += (self.now - before) * (count - 3)
                step(order[k + count - 1])
            k += count


@dataclass(frozen=True)
class RunBytes:
    """Bytes of a run by a plan, beyond those of all others.

    Attributes:
        kept: from its forward until its backward, its output included.
        forward: the most in the forward.
        backward: the most in the backward, what is kept and the gradient of the output included.
    """

    kept: int
    forward: int
    backward: int


def bytes_of(run: RunCost, first: int, second: int, budget: str | int) -> RunBytes:
    """Count the bytes of a plan: couplings [0, first) reversible, [first, second) checkpointed, the others stored."""
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
    left = (
        run.entry if spans and spans[-1][2] != "checkpoint" else 0
    )  # the output as it leaves, beside that of the last
    ahead.hold(run.behind + left)
    back.hold(ahead.now + run.state)  # the gradient of the output
    back.touch(run.entry)
    back.hold(-left)
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
    maps = run.maps(begin, end)
    meter.hold(maps.kept + (0 if begin else run.squeezed))
    meter.touch(maps.making)

    def step(k: int) -> None:
        net = run.couplings[k].net
        meter.hold(run.state)
        meter.touch(net.stored + net.output + net.positions * net.raw_out)
        meter.hold(net.stored + net.output + SMALL)

    meter.walk(run, range(begin, end), step)
    meter.hold(run.state)


def _store_backward(run: RunCost, begin: int, end: int, meter: Meter) -> None:
    """From the gradient of the output, which is held, to that of the input, which is held in its place."""
    maps, own, state = run.maps(begin, end), run.couplings, run.state

    def step(k: int) -> None:
        net = own[k].net
        meter.touch(state + net.output)
        # The output, or the map behind it, is done with; its gradients are there for those of u and of the net.
        meter.hold(-(state if k + 1 == end else own[k + 1].net.grad_state))
        meter.touch(net.positions * net.grads_inside + net.grads)
        # u, what the net has kept, the output and its gradient.
        meter.hold(net.grad_state - state - net.stored - net.output - SMALL)
        meter.hold(own[k].matrix)

    meter.walk(run, range(end - 1, begin - 1, -1), step)
    meter.touch(state)
    meter.hold(-own[begin].net.grad_state)
    meter.touch(maps.back)
    meter.hold(-maps.matrices - maps.kept - (0 if begin else run.squeezed))


def _chain_forward(run: RunCost, begin: int, end: int, keeps_states: bool, budget: str | int, meter: Meter) -> None:
    """Keeps the output, and by coupling its state or a witness; anchors; what tells a part its start."""
    for part in run.parts(begin, end, keeps_states):
        maps = run.maps(begin + part.maps[0], begin + part.maps[1])

        def step(k: int, making: int = maps.making) -> None:
            net = run.couplings[k].net
            chunk = net.chunk_for(budget)
            # u, the output whole and of the chunk, and the next state.
            gathered = 0 if chunk.whole else net.output
            running = net.running(chunk) - chunk.taken * net.hidden + gathered
            meter.touch(making + 2 * run.state + max(running, run.state + net.output))
            meter.hold(run.state if keeps_states else run.witness)

        meter.walk(run, range(begin + part.first, begin + part.end), step)
        meter.hold(run.state * len(part.anchors))
        if part.first > 0:
            meter.hold(run.state if part.knows_start else SKETCHED * run.witness)
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
        grads = sum(coupling.net.params for coupling in run.couplings[begin + part.first : begin + part.end])
        back(run, begin, part, budget, meter)
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


def _inverted(run: RunCost, begin: int, part: ChainPart, budget: str | int, meter: Meter) -> None:
    """A part's steps inverted, segment by segment between the anchors; the gradients of its nets are held."""
    state = run.state
    bounds = list(pairwise([begin + k for k in (part.first, *part.anchors, part.end)]))
    for start, end in reversed(bounds):
        before = 0 if end == begin + part.end else state  # the gradient with which a segment may be redone
        meter.hold(before)

        def step(k: int, end: int = end) -> None:
            net = run.couplings[k].net
            chunk = net.chunk_for(budget)
            inner = 0 if k + 1 == end else 2 * state  # y and its gradient, recomputed
            meter.hold(inner)
            # The step's input and the gradient of u come chunk by chunk into tensors of the whole.
            of_chunk = chunk.given * 2 * state // max(net.positions, 1)
            gathered = 0 if chunk.whole else 2 * state + net.grad_state + net.grads
            meter.touch(gathered + of_chunk + net.running(chunk) + chunk.given * net.out)
            meter.touch((gathered or 2 * state) + net.going_back(chunk))
            squeezing = 0 if k else SQUEEZING * run.squeezed
            meter.touch(net.params + 2 * state + net.grad_state + max(state, squeezing))  # the map
            meter.hold(-inner)
            meter.touch(net.params + (3 if k else 4) * state)  # the drift from a true input, which may be squeezed
            meter.hold(net.params + MEASURES * run.witness)

        meter.walk(run, range(end - 1, start - 1, -1), step)
        meter.hold(-before - MEASURES * run.witness * (end - start))


def _differentiated(run: RunCost, begin: int, part: ChainPart, budget: str | int, meter: Meter) -> None:
    """A part's steps differentiated from their states; the gradients of its nets are held."""
    state, start, end = run.state, begin + part.first, begin + part.end

    def step(k: int) -> None:
        net = run.couplings[k].net
        chunk = net.chunk_for(budget)
        held = 0 if k + 1 == end else state + run.couplings[k + 1].net.grad_state
        meter.hold(held)
        each = state // max(net.positions, 1)
        of_chunk = chunk.given * each * (2 if k + 1 == end else 1)  # the gradient of u, and once the output
        gathered = 0 if chunk.whole else state + net.grad_state + net.grads
        meter.touch(gathered + of_chunk + net.running(chunk) + chunk.given * net.out)
        meter.touch((gathered or state) + net.going_back(chunk))
        meter.hold(net.params - held)

    meter.walk(run, range(end - 1, start - 1, -1), step)
    squeezing = 0 if start else SQUEEZING * run.squeezed
    meter.touch(2 * state + run.couplings[start].net.grad_state + squeezing)


class Course:
    """The course of a whole step: all runs forward, the priors, then back in the opposite order.

    Args:
        rest: the model but for its runs.

    Attributes:
        priors: the most bytes while the priors are counted and differentiated, beyond what the runs keep.
    """

    def __init__(self, rest: RestCost) -> None:
        self._base, self._joins = rest.base, rest.joins
        meter = Meter(rest.base)
        for prior in rest.priors:
            meter.touch(prior.forward)
            meter.hold(prior.kept)
        for prior in reversed(rest.priors):
            meter.touch(prior.backward)
            meter.hold(prior.gradient - prior.kept)
        self.priors = meter.most
        # The gradients of parts that wait for the runs before each one, and for it.
        self._waiting = [0, *accumulate(join.gradients for join in rest.joins)]

    def need(self, index: int, run: RunBytes) -> int:
        """Count the most bytes while a run goes forward or back, beyond what the runs before it keep."""
        joining = run.kept + self._waiting[index + 1] + self._joins[index].joining
        return self._base + max(run.forward, joining, self._waiting[index] + run.backward)

    def peak(self, runs: Sequence[RunBytes]) -> int:
        """Count the most bytes of a step."""
        most = kept = 0
        for index, run in enumerate(runs):
            most = max(most, kept + self.need(index, run))
            kept += run.kept
        return max(most, kept + self.priors)
