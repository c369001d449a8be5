"""Verdicts that the host does not wait for: wrong gradients become zero, and the next pass knows why."""

from __future__ import annotations

import pytest
import torch
from support.captures import Recording, capture_guard, drifting, like_a_gpu
from support.chain_cases import chain
from support.gradients import batch, both_ways, gradients, worst_error
from torch import Tensor, nn

import pyglow_fast as pgf


def all_zero(grads: dict[str, Tensor]) -> bool:
    return not any(bool(grad.any()) for grad in grads.values())


def objective(first: nn.Module, second: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """Gradients of two runs in a row, whose outputs both count."""
    first.zero_grad(), second.zero_grad()
    middle, log_det_1 = first(x)
    z, log_det_2 = second(middle.tanh())
    (z.square().sum() + middle.square().sum() - log_det_1.sum() - log_det_2.sum()).backward()
    runs = {"first": first, "second": second}
    return {name: [p.grad for p in run.parameters() if p.grad is not None] for name, run in runs.items()}


@both_ways
@pytest.mark.parametrize("bad", ["first", "second"])
def test_runs_that_the_same_backward_reaches_later_are_zero_too(way: str, bad: str) -> None:
    """The gradient that they are handed has no part of the run that drifted: it would be wrong."""
    runs = {name: chain(8, deferred_check=True, tolerance=1e-6) for name in ("first", "second")}
    x = batch()
    expected = objective(runs["first"], runs["second"], x)
    control = runs[bad].control_of(way == "inverse")
    limit, control.tolerance = control.tolerance, 1e-30
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
    control.tolerance = limit
    again = objective(runs["first"], runs["second"], x)
    assert all(bool(grad.any()) for grad in (*again["first"], *again["second"])), "a new backward begins anew"


def step_gradients(sequence: pgf.ReversibleSequence, x: Tensor) -> dict[str, Tensor]:
    """Of an objective that takes nothing from the host."""

    def objective(x: Tensor, cond: Tensor | None) -> Tensor:
        z, log_det = sequence(x)
        return (z.square() * (1 + 0.1 * z)).sum() - log_det.sum()

    return gradients(sequence, x, run=objective)


class Replayed:
    """The gradients of a run of steps as a graph has them, and a factor that its recomputed states are off by."""

    def __init__(self, patch: pytest.MonkeyPatch, sequence: pgf.ReversibleSequence, x: Tensor) -> None:
        self.x, self.factor = x.clone(), drifting(patch, x)
        with Recording() as self.graph, capture_guard():
            self.gradients = step_gradients(sequence, self.x)

    def replay(self, factor: float = 1.0) -> dict[str, Tensor]:
        self.factor.fill_(factor)
        self.graph.replay()
        return {name: grad.clone() for name, grad in self.gradients.items()}


class TestCaptured:
    """Nothing is read: verdicts are counted where the tensors are until someone asks."""

    def test_replays_are_counted_and_those_that_drifted_are_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, x = chain(8, tolerance=1e-9), batch()  # not told to defer
        with like_a_gpu():
            alone = step_gradients(sequence, x)
            graph = Replayed(monkeypatch, sequence, x)
            report = sequence.memory_report()
            assert (report["passes"], report["trips"]) == (1, 0), "a capture is no pass"
            expected = graph.replay()
            assert worst_error(expected, alone) < 1e-9  # what is recorded is not computed by csrc/run
            assert all_zero(graph.replay(1.001))
            assert all_zero(graph.replay(float("nan")))
            again = graph.replay()
            assert all(torch.equal(again[name], value) for name, value in expected.items())
            report = sequence.memory_report()
            assert (report["passes"], report["trips"], report["skipped"]) == (5, 2, 2)
            assert report["anchor_every"] == 2
            assert all_zero(graph.replay(1.001))
            assert sequence.memory_report()["skipped"] == 3
            assert sequence.control.spacing == 2, "the graph's own anchors are where they were"

    def test_a_capture_without_a_step_before_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, x = chain(8), batch()
        step_gradients(sequence, x)  # not as on a GPU: no counters
        expected = "CUDA graph: expected a step run before .*, found a capture that begins without counters of drift"
        with like_a_gpu(), pytest.raises(ValueError, match=expected):
            Replayed(monkeypatch, sequence, x)
