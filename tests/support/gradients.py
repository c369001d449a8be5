"""Gradients of flows in every memory mode, by public names alone, and what it takes for two of them to be equal."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import functional
from pyglow_fast._core.backend import extension
from support.helpers import tolerance as rounding

# What a rounding of a state may grow by on its way into a gradient, in the small flows of the tests.
CONDITION = 1000.0
# Of a recomputed state, in float64: it is looser than the default, so that inverted steps are not computed again and
# what is compared is the gradient by inversion alone.
LOOSE = 1e-11

Gradients = dict[str, Tensor]
Run = Callable[..., Tensor]

PLANS = extension() is not None  # memory in bytes needs the compiled kernels
SHAPE = (4, 6, 3)  # of the states that steps() maps, and of batch()


def turn(patch: pytest.MonkeyPatch) -> None:
    """Let a run of steps that is called go from latents to data, and report on that."""
    inverse, report = pgf.ReversibleSequence.inverse, pgf.ReversibleSequence.memory_report

    def called(self: Any, x: Tensor, cond: Tensor | None = None, squeeze_first: bool = False, **rest: Any) -> Any:
        run = inverse if "mask" not in rest else pgf.MaskedSequence.inverse
        return run(self, functional.squeeze(x) if squeeze_first else x, cond, **rest)

    def reported(self: Any) -> dict[str, Any]:
        found = report(self)
        return found | found.get("inverse", {})

    patch.setattr(pgf.ReversibleSequence, "__call__", called)
    patch.setattr(pgf.ReversibleSequence, "memory_report", reported)


def both_ways(test: Any, marks: Sequence[pytest.MarkDecorator] = ()) -> Any:
    """Run a test as it is, and with runs of steps that are called from latents to data; ``marks`` are the latter's."""
    cases = pytest.mark.parametrize("way", ["forward", pytest.param("inverse", marks=marks)], indirect=True)
    return pytest.mark.usefixtures("way")(cases(test))


both_ways_in_full = partial(both_ways, marks=[pytest.mark.full])  # the second case with --full


def perturbed(module: Any, spread: float = 0.1) -> Any:
    """Move every parameter away from the special value that it starts at."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module


def ready(steps: list[pgf.FlowStep], shape: tuple[int, ...] = SHAPE, cond: Tensor | None = None, **options: Any) -> Any:
    """A run of these steps, in mode "store" if no other is given: float64, initialised, away from the start."""
    sequence = pgf.ReversibleSequence(steps, **{"memory": "store", **options}).double()
    sequence.initialize(torch.randn(64, *shape, dtype=torch.float64), cond)
    return perturbed(sequence)


def steps(count: int = 5, **options: Any) -> Any:
    """A run of FlowSteps."""
    return ready([pgf.FlowStep(4, 5, **options) for _ in range(count)])


def batch(n: int = 3, *shape: int) -> Tensor:
    """n random samples of this shape, of SHAPE where none is given. Float64."""
    return torch.randn(n, *(shape or SHAPE), dtype=torch.float64)


def objective(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Compute a scalar that every value of z and log_det enters with its own weight."""
    z, log_det = outputs
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype)
    linear = torch.randn(log_det.shape, generator=generator, dtype=torch.float64).to(log_det.dtype)
    return (weight * z + 0.1 * z.square()).sum() + (linear * log_det).sum()


def gradients(model: nn.Module, x: Tensor, cond: Tensor | None = None, run: Run | None = None) -> Gradients:
    """Compute the gradients of the objective (or of ``run(x, cond)``) in x, cond and all parameters, by name."""
    leaf = x.detach().requires_grad_()
    cond_leaf = None if cond is None else cond.detach().requires_grad_()
    named = {"x": leaf} | ({} if cond_leaf is None else {"cond": cond_leaf})
    named |= {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    value = objective(model(leaf, cond_leaf)) if run is None else run(leaf, cond_leaf)
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Compute the error in the Euclidean norm, against the expected one (or 1 if that is smaller)."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1.0))


def worst_error(actual: Gradients, expected: Gradients) -> float:
    """Compute the largest error of all tensors; both must have the same names."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = [relative_error(actual[name], grad) for name, grad in expected.items()]
    return float("nan") if any(error != error for error in errors) else max(errors)


def assert_same_gradients(actual: Gradients, expected: Gradients, label: object = "") -> None:
    """Check that gradients agree up to the rounding of a sum over the batch, grown by CONDITION. Float64."""
    n_values = expected["x"].numel() if "x" in expected else 1000
    assert all(grad.dtype == torch.float64 for grad in expected.values())
    error = worst_error(actual, expected)
    assert error <= rounding(max(n_values, 1), CONDITION), f"{label} relative error {error:.2e}"


@dataclass(frozen=True)
class Memory:
    """How a run of steps keeps its states, as a user asks for it.

    Args:
        mode: of ReversibleSequence; or "bytes", for a budget half way from the least to what storing takes, and for
            "store" where bytes are refused, since the compiled run does not compute the steps.
        anchor_every, budget: of ReversibleSequence.
        tolerance: None: LOOSE in float64, else the default.
    """

    mode: str
    anchor_every: str | int | None = "auto"
    budget: str | int = "auto"
    tolerance: float | None = None

    def apply(self, sequence: pgf.ReversibleSequence) -> None:
        """Set mode, anchors and budget of the sequence itself, whose controls start anew."""
        sequence.memory, sequence.memory_budget = self.mode, self.budget
        for name in ("control", "inverse_control"):
            old = getattr(sequence, name)
            setattr(sequence, name, type(old)(len(sequence), self.anchor_every, old.tolerance))

    def of(self, sequence: pgf.ReversibleSequence, *inputs: Tensor | None) -> pgf.ReversibleSequence:
        """Make a run of the very same steps in this mode; ``inputs`` are those of a batch that it will get."""
        memory = "store" if self.mode == "bytes" else self.mode
        is_double = next(sequence.parameters()).dtype == torch.float64
        tolerance = LOOSE if self.tolerance is None and is_double else self.tolerance
        found = type(sequence)(list(sequence), memory, self.anchor_every, tolerance, self.budget)
        found.training = sequence.training
        if self.mode == "bytes":
            try:
                found.memory = bytes_between(found, 0.5, *inputs)
            except ValueError as refusal:
                if "memory: expected a mode such as" not in str(refusal):
                    raise
                found.memory = "store"
        return found


def bytes_between(sequence: pgf.ReversibleSequence, share: float, *inputs: Tensor | None) -> int:
    """Find the budget that lies this far from the least that a run accepts to what it takes to store everything."""
    given = [None if value is None else value.detach().requires_grad_() for value in inputs]
    sequence.memory = 2**50
    sequence(*given)
    most = sequence.memory_report()["predicted_bytes"]
    sequence.memory = 1
    least = least_bytes(lambda: sequence(*given))
    return int(least + share * (most - least))


def least_bytes(refused: Callable[[], object]) -> int:
    """Read from the refusal of a budget how many bytes would have been enough."""
    with pytest.raises(ValueError, match=r"memory: expected at least \d+ bytes") as refusal:
        refused()
    found = re.search(r"at least (\d+) bytes", str(refusal.value))
    assert found is not None
    return int(found[1])


# No anchors, some, the default; nets whole, in chunks of samples, and row by row.
RECOMPUTING = [
    Memory("checkpoint"),
    Memory("reversible"),
    Memory("reversible", None),
    Memory("reversible", 2),
    Memory("checkpoint", budget=1),
    Memory("reversible", None, 1),
    Memory("reversible", 2, 4000),
]
REDONE = Memory("reversible", 2, tolerance=1e-30)  # every state is taken for a drifted one
BYTES = Memory("bytes")  # of runs of FlowSteps alone
MEMORIES = [*RECOMPUTING, BYTES]


def memories_of(sequence: pgf.ReversibleSequence) -> list[Memory]:
    """Byte budgets are for FlowSteps alone, and nothing but their nets is cut into chunks."""
    own = all(isinstance(step, pgf.FlowStep) for step in sequence)
    return MEMORIES if own else [memory for memory in RECOMPUTING if memory.budget == "auto"]


def assert_stored_gradients(
    sequence: pgf.ReversibleSequence,
    x: Tensor,
    cond: Tensor | None = None,
    run: Callable[[pgf.ReversibleSequence, Tensor, Tensor | None], Tensor] | None = None,
) -> Gradients:
    """Check that each memory mode gives the stored gradients (of ``run(sequence, x, cond)``), which are returned."""

    def found(own: pgf.ReversibleSequence) -> Gradients:
        return gradients(own, x, cond, None if run is None else lambda *inputs: run(own, *inputs))

    sequence.memory = "store"
    expected = found(sequence)
    assert expected
    for memory in memories_of(sequence):
        own = memory.of(sequence, x, cond)
        got = found(own)
        # An output that is not used gives no gradient, or one of zeros.
        wanted = {name: expected.get(name, torch.zeros_like(grad)) for name, grad in got.items()}
        assert expected.keys() <= got.keys()
        assert_same_gradients(got, wanted, memory)
        report = own.memory_report()
        assert report["trips"] == 0, f"{memory}: steps were computed again, so their inversion was not tested"
    return expected
