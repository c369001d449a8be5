"""Before a candidate is timed: it computes what it should.

Ours, plain and memcnn are one function, held against its float64 by the reference. A peer has a function of its own;
its variants are held against the first of them, and every one against its own inverse.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.memory_case import gradient_error, training_step
from bench.memory_models import OURS
from bench.model_cases import CHECKPOINTED, COMPILED, EAGER, LOG_PROB, MEMCNN, PLAIN, TRAIN, Candidate, Candidates

SAME_FUNCTION = (*OURS, PLAIN, CHECKPOINTED, MEMCNN)
# Of float32 against float64: nats per dimension; of all gradients together, relative to their norm; of values of x.
LOG_PROB_TOLERANCE, GRADIENT_TOLERANCE, SAMPLE_TOLERANCE = 1e-5, 1e-3, 1e-3
# By how much the mean log_prob of other samples may differ, nats per dimension.
SPREAD = 0.2
SEED = 5


class Unequal(RuntimeError):
    """A candidate does not compute what it should, so that its time means nothing."""


def _hold(what: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # also NaN
        raise Unequal(f"{what}: off by {error:.1e}, more than {tolerance:.0e}")


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).abs().max())


class Checks:
    """The checks of one configuration and workload; every candidate must pass before it is timed."""

    def __init__(self, candidates: Candidates, workload: str) -> None:
        self.workload = workload
        self.n_values = candidates.x[0].numel()
        self._first: dict[str, Tensor] = {}  # by implementation (one name for all of our function)
        self._level: dict[str, float] = {}
        self._exact_gradients: list[Tensor] = []
        if any(candidate.implementation in SAME_FUNCTION for candidate in candidates.of(workload)):
            self._prepare(candidates)

    def _prepare(self, candidates: Candidates) -> None:
        if self.workload == TRAIN:
            exact = candidates.exact()
            training_step(exact, candidates.x.double())()
            self._exact_gradients = [p.grad for p in exact.parameters() if p.grad is not None]
        elif self.workload == LOG_PROB:
            with torch.no_grad():
                self._first["ours"] = candidates.exact().log_prob(candidates.x.double())

    def check(self, candidate: Candidate) -> None:
        """Run it once and compare.

        Raises:
            Unequal: it computes something else.
        """
        if candidate.variant == COMPILED and self.workload != TRAIN:
            candidate.eager().run(self.workload)()  # what a peer caches in evaluation is there when it is compiled
        result = candidate.run(self.workload)()
        if self.workload == TRAIN:
            self._gradients(candidate)
        elif self.workload == LOG_PROB:
            self._log_prob(candidate, result)
        else:
            self._sample(candidate, result)

    def _gradients(self, candidate: Candidate) -> None:
        found = candidate.gradients()
        asleep = sum(not bool(grad.any()) for grad in found)
        if asleep:
            raise Unequal(f"{candidate.name}: {asleep} gradients are zero, its nets put out nothing")
        if candidate.implementation in SAME_FUNCTION:
            error, _ = gradient_error(found, self._exact_gradients)
            _hold(f"{candidate.name}, gradients", error, GRADIENT_TOLERANCE)
            return
        norm = torch.stack([grad.double().norm() for grad in found]).norm()
        expected = self._first.setdefault(candidate.implementation, norm)
        _hold(f"{candidate.name}, norm of gradients", _difference(norm / expected, norm.new_ones(())), 1e-3)

    def _log_prob(self, candidate: Candidate, found: Tensor) -> None:
        key = "ours" if candidate.implementation in SAME_FUNCTION else candidate.implementation
        expected = self._first.setdefault(key, found)
        _hold(f"{candidate.name}, log_prob", _difference(found, expected) / self.n_values, LOG_PROB_TOLERANCE)

    @torch.no_grad()
    def _sample(self, candidate: Candidate, sampled: Tensor) -> None:
        model, x = candidate.model, candidate.x
        back = model.decode(model.encode(x))
        _hold(f"{candidate.name}, decode(encode(x))", _difference(back, x), SAMPLE_TOLERANCE)
        same = candidate.implementation in SAME_FUNCTION
        key = "ours" if same else candidate.implementation
        # How likely its samples are to itself; all of one function agree but for chance.
        level = float(model.log_prob(sampled).double().mean()) / self.n_values
        _hold(f"{candidate.name}, log_prob(sample)", abs(level - self._level.setdefault(key, level)), SPREAD)
        if candidate.variant == COMPILED:
            return  # it has a generator of its own
        torch.manual_seed(SEED)
        again = candidate.run(self.workload)()
        _hold(f"{candidate.name}, sample", _difference(again, self._first.setdefault(key, again)), SAMPLE_TOLERANCE)


def passing(checks: Checks, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Those that run and pass, and a line for each that does not.

    Raises:
        Unequal: ours or plain computes something else, not under torch.compile.
        Exception: what eager ours or plain raises.
    """
    found, lines = [], []
    for candidate in candidates:
        must = candidate.implementation in (*OURS, PLAIN)
        what = f"{candidate.name}, {checks.workload} is left out"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries' deprecated calls, and of the compiler
                checks.check(candidate)
        except Unequal as error:
            if must and candidate.variant != COMPILED:
                raise
            lines.append(f"{what}: {error}")
        except Exception as error:  # whatever a library or a compiler raises is the reason that is printed
            if must and candidate.variant == EAGER:
                raise
            lines.append(f"{what}, it does not run: {_short(error)}")
        else:
            found.append(candidate)
    return found, lines


def _short(error: Exception) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
