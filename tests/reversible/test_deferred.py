"""Verdicts that the host does not wait for: wrong gradients become zero, and the next pass knows why."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.chain_cases import CASES, gradients
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.reversible import deferred, passes, walk
from pyglow_fast.reversible.drift import DriftControl

CASE = next(case for case in CASES if case.name == "depth-8")


@contextmanager
def wrong_states(factor: float, only: int | None = None) -> Iterator[None]:
    """Recomputed states are off by a factor: all, or that of one call."""
    true, calls = passes.step_backward, []

    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        found, *grads = true(*inputs)
        calls.append(0)
        return (factor * found if only in (None, len(calls)) else found, *grads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "step_backward", wrong)
        yield


def user_steps(deferred_check: bool) -> pgf.ReversibleSequence:
    """A run that is not of FlowSteps alone."""
    torch.manual_seed(0)
    steps: list[nn.Module] = [pgf.ActNorm(4), pgf.InvConv(4), pgf.FlowStep(4, 5), pgf.InvConv(4)]
    sequence = pgf.ReversibleSequence(steps, anchor_every=2, deferred_check=deferred_check).double()
    sequence.initialize(torch.randn(8, 4, 3, 2, dtype=torch.float64))
    return sequence


def all_zero(grads: dict[str, Tensor]) -> bool:
    return not any(bool(grad.any()) for grad in grads.values())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_without_drift_it_changes_nothing() -> None:
    sequence, (x, _) = CASE.build(), CASE.batch()
    expected = gradients(sequence, x)
    sequence.control = DriftControl(8, deferred=True)
    assert same(gradients(sequence, x), expected)
    report = sequence.memory_report()
    assert (report["passes"], report["skipped"], report["trips"]) == (1, 0, 0)
    assert 0.0 < report["last_drift"] < 1e-13


@pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf")])
def test_what_has_drifted_becomes_zero_and_the_next_pass_is_warned(factor: float) -> None:
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    expected = gradients(sequence, x)
    with wrong_states(factor, only=3):
        assert all_zero(gradients(sequence, x))
    assert sequence.control.spacing == 4, "not known yet"
    assert same(gradients(sequence, x), expected) is False  # other anchors, other roundings
    assert sequence.control.spacing == 2
    report = sequence.memory_report()
    assert (report["passes"], report["trips"], report["skipped"], report["redone_steps"]) == (3, 1, 1, 0)


def test_steps_of_the_user() -> None:
    x = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    expected, sequence = gradients(user_steps(False), x), user_steps(True)
    assert same(gradients(sequence, x), expected)
    sequence.control.tolerance = 1e-30
    assert all_zero(gradients(sequence, x))
    assert sequence.memory_report()["skipped"] == 1


def objective(first: nn.Module, second: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Gradients of two runs in a row, whose outputs both count."""
    first.zero_grad(), second.zero_grad()
    middle, log_det_1 = first(x)
    z, log_det_2 = second(middle)
    (z.square().sum() + middle.square().sum() - log_det_1.sum() - log_det_2.sum()).backward()
    runs = {"first": first, "second": second}
    return {name: [p.grad for p in run.parameters() if p.grad is not None] for name, run in runs.items()}


@pytest.mark.parametrize("bad", ["first", "second"])
def test_runs_that_the_same_backward_reaches_later_are_zero_too(bad: str) -> None:
    """The gradient that they are handed has no part of the run that drifted: it would be wrong."""
    runs = {name: CASE.build(deferred_check=True, tolerance=1e-6) for name in ("first", "second")}
    x, _ = CASE.batch()
    expected = objective(runs["first"], runs["second"], x)
    limit = runs[bad].control.tolerance
    runs[bad].control.tolerance = 1e-30
    found = objective(runs["first"], runs["second"], x)
    assert not any(bool(grad.any()) for grad in found["first"])
    if bad == "first":  # the second was differentiated before, and rightly
        assert all(torch.equal(a, b) for a, b in zip(found["second"], expected["second"], strict=True))
    else:
        assert not any(bool(grad.any()) for grad in found["second"])
    reports = {name: run.memory_report() for name, run in runs.items()}
    assert {name: report["trips"] for name, report in reports.items()} == {
        "first": bad == "first",
        "second": bad == "second",
    }
    assert {name: report["skipped"] for name, report in reports.items()} == {"first": 1, "second": bad == "second"}
    runs[bad].control.tolerance = limit
    again = objective(runs["first"], runs["second"], x)
    assert all(bool(grad.any()) for grad in (*again["first"], *again["second"])), "a new backward begins anew"


def test_in_a_glow() -> None:
    model = pgf.Glow(image_shape=(1, 8, 8), n_levels=2, n_steps=2, hidden=4, deferred_check=True).double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64) - 0.5
    model.initialize(x)
    model.levels[1].steps.control.tolerance = 1e-30
    (-model.log_prob(x)).sum().backward()
    assert not any(bool(p.grad.any()) for level in model.levels for p in level.parameters() if p.grad is not None)
    assert [(level["trips"], level["skipped"]) for level in model.memory_report()] == [(0, 1), (1, 1)]


def test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read: verdicts are counted where the tensors are until someone asks."""
    monkeypatch.setattr(walk, "is_capturing", lambda _: True)
    monkeypatch.setattr(deferred, "is_capturing", lambda _: True)
    sequence, (x, _) = CASE.build(), CASE.batch()  # not told to defer
    gradients(sequence, x)
    with wrong_states(1.001):
        assert all_zero(gradients(sequence, x))
    sequence.control.settle(wait=True)
    assert sequence.control.learnt.passes == 0
    monkeypatch.setattr(deferred, "is_capturing", lambda _: False)
    report = sequence.memory_report()
    assert (report["passes"], report["skipped"], report["anchor_every"]) == (2, 1, 2)


def test_a_copy_that_is_under_way_is_not_waited_for() -> None:
    class Event:
        ready = False

        def query(self) -> bool:
            return self.ready

    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    gradients(sequence, x)
    event = Event()
    sequence.control._verdicts._event = event  # type: ignore[assignment]
    sequence.control.settle()
    assert sequence.control.learnt.passes == 0
    event.ready = True
    sequence.control.settle()
    sequence.control.settle()
    assert sequence.control.learnt.passes == 1


def test_copies_take_nothing_that_is_under_way() -> None:
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    gradients(sequence, x)
    other = copy.deepcopy(sequence)
    assert other.memory_report()["passes"] == 0
    assert sequence.memory_report()["passes"] == 1
    assert float(sequence.control.state()[5]) == 1


def test_frequent_losses_are_warned_of() -> None:
    control = DriftControl(8, 4, deferred=True)
    for _ in range(15):
        control.record(1.0, 1e-6, 0, 4, drifted=True, skipped=True)
    with pytest.warns(UserWarning, match="lost, with all gradients"):
        control.record(1.0, 1e-6, 0, 4, drifted=True, skipped=True)


def test_flags_do_not_pile_up() -> None:
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    for _ in range(deferred.REMEMBERED + 3):
        gradients(sequence, x)
    assert len(deferred._flags) == deferred.REMEMBERED


def test_option_is_a_bool() -> None:
    with pytest.raises(ValueError, match="deferred_check: expected a bool, found 'yes'"):
        pgf.ReversibleSequence([pgf.FlowStep(4, 5)], deferred_check="yes")
