"""Checks that a candidate computes what it should, before it is timed.

Ours, plain and memcnn are one function, a peer has one of its own; every candidate is held against its function in
float64. Samples, whose noise float64 draws otherwise, are held against it by decoding its latents, and against the
other variants' by one seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import precisions
from bench.memory_case import gradient_error, training_step
from bench.memory_models import OURS, RAW_SIZE, Shape
from bench.model_cases import CHECKPOINTED, COMPILED, EAGER, LOG_PROB, MEMCNN, PLAIN, TRAIN, Candidate, Candidates

SAME_FUNCTION = (*OURS, PLAIN, CHECKPOINTED, MEMCNN)
# The bound on how much the mean log_prob of other samples may differ, in nats per dimension.
SPREAD = 0.2
SEED = 5
OF_A_NORMAL = 0.5 * math.log(2.0 * math.pi * math.e)  # minus its mean log-density


class Unequal(RuntimeError):
    """Raised when a candidate does not compute what it should, so that its time means nothing."""


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """The errors that a candidate may have: log_prob in nats per dimension, gradients together and samples relative."""

    log_prob: float
    gradients: float
    samples: float


FLOAT_TOLERANCES = Tolerances(log_prob=1e-5, gradients=1e-3, samples=1e-3)


def tolerances(shape: Shape, candidate: Candidate, log_prob: float = 0.0) -> Tolerances:
    """Derives the tolerance for a shape and dtype whose exact log_prob is so many nats per dimension.

    In bfloat16 what rounding does (bench.precisions): in our function that of the nets alone; in a peer's, whose state
    autocast rounds too, that of the state. In TF32 that of its unit: all but ours map the state by convolutions, which
    round it. Errors of log_prob are not given a margin: over the values of an image they cancel, so that they are far
    below.
    """
    if candidate.dtype == torch.float32 and not candidate.tf32:
        return FLOAT_TOLERANCES
    steps, margin = shape.n_levels * shape.n_steps, precisions.MARGIN
    unit = precisions.TF32_UNIT if candidate.tf32 else precisions.UNIT
    if candidate.implementation in (OURS if candidate.tf32 else SAME_FUNCTION):
        flow = precisions.flow_error(steps, RAW_SIZE, unit)
        return Tolerances(flow, precisions.flow_gradient_error(steps, RAW_SIZE, unit), margin * flow)
    log_det = abs(log_prob) + OF_A_NORMAL
    return Tolerances(
        precisions.state_log_prob_error(steps, log_det, unit),
        margin * precisions.state_gradient_error(steps, unit),
        margin * precisions.state_error(steps, unit),
    )


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of a candidate: all gradients together and the worst of one tensor, or the values, as in ModelRow."""

    gradients: float | None = None
    worst_gradient: float | None = None
    values: float | None = None


def _hold(what: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:  # also NaN
        raise Unequal(f"{what}: off by {error:.1e}, more than {tolerance:.0e}")
    return error


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).abs().max())


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@contextlib.contextmanager
def _double() -> Iterator[None]:
    """New tensors are float64: some libraries' layers make constants of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Checks:
    """The checks of one configuration and workload; every candidate must pass before it is timed.

    ``errors``: by name, of the candidates that passed.
    """

    def __init__(self, candidates: Candidates, workload: str) -> None:
        self.workload, self._candidates = workload, candidates
        self.n_values = candidates.x[0].numel()
        self.errors: dict[str, Errors] = {}
        self._exact: dict[str, list[Tensor]] = {}  # by function
        self._first: dict[tuple[str, torch.dtype], Tensor] = {}
        self._level: dict[str, float] = {}

    @staticmethod
    def _function(candidate: Candidate) -> str:
        return PLAIN if candidate.implementation in SAME_FUNCTION else candidate.implementation

    def _truth(self, candidate: Candidate) -> list[Tensor]:
        """Gradients, log_prob or latents of the candidate's function in float64."""
        function = self._function(candidate)
        if function not in self._exact:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exact, x = self._candidates.exact(function), self._candidates.x.double()
            with _double():
                self._exact[function] = self._run_exact(exact.train(self.workload == TRAIN), x)
        return self._exact[function]

    def _run_exact(self, exact: Any, x: Tensor) -> list[Tensor]:
        if self.workload == TRAIN:
            training_step(exact, x)()
            return [p.grad for p in exact.parameters() if p.grad is not None]
        with torch.no_grad():
            return [exact.log_prob(x)] if self.workload == LOG_PROB else exact.encode(x)

    def check(self, candidate: Candidate) -> None:
        """Run it once and compare.

        Raises:
            Unequal: it computes something else.
        """
        if candidate.variant == COMPILED and self.workload != TRAIN:
            candidate.eager().run(self.workload)()  # what a peer caches in evaluation is there when it is compiled
        result = candidate.run(self.workload)()
        if self.workload == TRAIN:
            self.errors[candidate.name] = self._gradients(candidate)
        elif self.workload == LOG_PROB:
            self.errors[candidate.name] = self._log_prob(candidate, result)
        else:
            self.errors[candidate.name] = self._sample(candidate, result)

    def _tolerances(self, candidate: Candidate, log_prob: float = 0.0) -> Tolerances:
        return tolerances(self._candidates.shape, candidate, log_prob)

    def _gradients(self, candidate: Candidate) -> Errors:
        found = candidate.gradients()
        asleep = sum(not bool(grad.any()) for grad in found)
        if asleep:
            raise Unequal(f"{candidate.name}: {asleep} gradients are zero, its nets put out nothing")
        error, worst = gradient_error(found, self._truth(candidate))
        _hold(f"{candidate.name}, gradients", error, self._tolerances(candidate).gradients)
        return Errors(error, worst)

    def _log_prob(self, candidate: Candidate, found: Tensor) -> Errors:
        (expected,) = self._truth(candidate)
        error = _difference(found, expected) / self.n_values
        limits = self._tolerances(candidate, float(expected.mean()) / self.n_values)
        return Errors(values=_hold(f"{candidate.name}, log_prob", error, limits.log_prob))

    @torch.no_grad()
    def _sample(self, candidate: Candidate, sampled: Tensor) -> Errors:
        x, tolerance, function = candidate.x, self._tolerances(candidate).samples, self._function(candidate)
        back = candidate.decode([latent.to(x.dtype) for latent in self._truth(candidate)])
        error = _relative(back, x)
        _hold(f"{candidate.name}, decode(encode(x))", error, tolerance)
        # How likely its samples are to itself; all of one function agree but for chance.
        with candidate.context():
            level = float(candidate.model.log_prob(sampled.to(x.dtype)).double().mean()) / self.n_values
        _hold(f"{candidate.name}, log_prob(sample)", abs(level - self._level.setdefault(function, level)), SPREAD)
        if candidate.variant == COMPILED:
            return Errors(values=error)  # it has a generator of its own
        torch.manual_seed(SEED)
        again = candidate.run(self.workload)()
        first = self._first.setdefault((function, candidate.dtype), again)
        both = 1 if candidate.dtype == torch.float32 and not candidate.tf32 else 2  # are off
        _hold(f"{candidate.name}, sample", _relative(again, first), both * tolerance)
        return Errors(values=error)


def passing(checks: Checks, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Choose candidates that run and pass; returns also a line for each that does not.

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
