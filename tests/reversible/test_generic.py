"""The generic path, cut into parts of few steps: what drifts is found and redone, whatever part it is of.

It computes here what csrc/run is for: steps with CouplingNets. Its gradients are the business of test_cut_runs.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.captures import drifting
from support.chain_cases import (
    EVERY_STEP,
    ONE_PART,
    Case,
    Mode,
    assert_same_gradients,
    cut_parts,
    gradients,
    objective,
)
from torch import Tensor

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast.layers import reversible_sequence
from pyglow_fast.reversible import steps as steps_module

DEEP = Case(8)


@pytest.fixture(autouse=True)
def _generic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reversible_sequence, "is_runnable", lambda x: False)


@pytest.fixture(params=[1, 3], ids=lambda steps: f"parts-of-{steps}")
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of a part."""
    cut_parts(monkeypatch, EVERY_STEP, request.param)
    return int(request.param)


def stored(sequence: pgf.ReversibleSequence, *inputs: Any) -> dict[str, Tensor]:
    """The gradients by ordinary autograd; what follows is not redone."""
    sequence.control.tolerance = 1e-11
    Mode("store").apply(sequence)
    return gradients(sequence, *inputs)


def saved_bytes(depth: int, mode: Mode) -> int:
    """Bytes from forward to backward, but for parameters and x."""
    sequence = pgf.ReversibleSequence([pgf.FlowStep(24, 4) for _ in range(depth)], tolerance=1e-3)
    x = torch.randn(2, 24, 8, 8)
    sequence.initialize(x)
    mode.apply(sequence)
    sequence(x)  # signs are made once
    with MemoryMeter() as meter:
        z, log_det = sequence(x)
        del log_det
        now = meter.now
    assert z.requires_grad
    return now


@pytest.mark.full
def test_what_a_step_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """N C floats of projections and no matrix of its map; with checkpoints a state."""
    # Log-dets of parts and of nets wait to be summed.
    projections, state, slack = 4 * 2 * 24, 4 * 2 * 24 * 8 * 8, 64 + 16 * 2
    cut_parts(monkeypatch, ONE_PART)
    growth = [
        (saved_bytes(64, mode) - saved_bytes(16, mode)) / 48 for mode in (Mode("reversible", None), Mode("checkpoint"))
    ]
    assert projections <= growth[0] <= projections + slack < 4 * 24**2
    assert state <= growth[1] <= 2 * state + slack


class TestDrift:
    """What drifts is redone from the anchor before it, and the gradient is right in any case."""

    def planted(self, monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
        """The state that the inversion of step ``at`` of 0..7 gives is wrong; an item for each inversion."""
        true, seen = steps_module.coupling_backward_from_output, []

        def wrong(*inputs: Any) -> tuple[Tensor, ...]:
            found, *grads = true(*inputs)
            seen.append(7 - len(seen))  # the step: none before this one is redone
            return (1.01 * found if seen[-1] == at else found, *grads)

        monkeypatch.setattr(steps_module, "coupling_backward_from_output", wrong)
        return seen

    @pytest.mark.parametrize("cond", [False, True])
    @pytest.mark.parametrize(
        ("steps", "every", "at", "redone"),
        [
            (1, None, 6, 1),  # the input of a part, which is known
            (1, 4, 7, 1),
            (3, None, 7, 2),  # parts 0..2, 3..5, 6 and 7: in the middle, which a projection tells of
            (3, None, 4, 3),
            (3, 5, 7, 2),
            (8, None, 3, 8),  # one part alone is judged as one
            (8, None, 0, 8),
            (8, 4, 6, 8),
        ],
        ids=str,
    )
    def test_a_planted_drift(
        self, steps: int, every: int | None, at: int, redone: int, cond: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = Case(8, (2, 6, 3)) if cond else DEEP
        sequence, (x, given) = case.build(), case.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x, given)
        sequence.control.tolerance = 1e-9
        cut_parts(monkeypatch, EVERY_STEP, steps)
        Mode("reversible", every).apply(sequence)
        self.planted(monkeypatch, at)
        assert_same_gradients(gradients(sequence, x, given), expected)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"], report["redone_steps"]) == (1, 1, redone)
        assert 1e-3 < report["last_drift"] < 1e-1

    @pytest.mark.parametrize("at", [5, 7])
    def test_behind_parts_without_a_gradient(self, at: int, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of steps 0..2, which are frozen, nothing is kept: the input of the first that is trained is."""
        sequence, (x, _) = DEEP.build(), DEEP.batch()
        for step in list(sequence)[:3]:
            step.requires_grad_(False)
        expected = stored(sequence, x)
        sequence.control.tolerance = 1e-9
        Mode("reversible", None).apply(sequence)
        self.planted(monkeypatch, at)
        objective(sequence(x)).backward()
        found = {name: p.grad for name, p in sequence.named_parameters() if p.requires_grad}
        assert_same_gradients(found, {name: expected[name] for name in found})
        assert (sequence.memory_report()["passes"], sequence.memory_report()["trips"]) == (1, 1)

    @pytest.mark.parametrize("factor", [1.0, 1.001, float("nan"), float("inf")])
    def test_deferred(self, factor: float, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """All parts invert; what has drifted makes its own gradients zero, and those of the parts before it."""
        sequence, (x, _) = DEEP.build(tolerance=1e-9), DEEP.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        Mode("reversible", 3).apply(sequence)
        sequence.control.deferred = True
        drifting(monkeypatch, x).fill_(factor)
        found = gradients(sequence, x)
        report = sequence.memory_report()
        drifted = factor != 1.0
        assert (report["passes"], report["redone_steps"]) == (1, 0)
        assert (report["trips"], report["skipped"]) == (drifted, drifted)
        if drifted:
            assert not any(grad.any() for grad in found.values())
        else:
            assert_same_gradients(found, expected)
