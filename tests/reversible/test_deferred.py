"""Verdicts that the host does not wait for: wrong gradients become zero, and the next pass knows why."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from support.captures import NotCapturableError, Recording, capture_guard, capturing, drifting, like_a_gpu
from support.chain_cases import CASES, gradients, worst_error
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast._captures import Later
from pyglow_fast.reversible import deferred, run
from pyglow_fast.reversible.drift import DriftControl

CASE = next(case for case in CASES if case.name == "depth-8")


@contextmanager
def wrong_states(factor: float) -> Iterator[None]:
    """Recomputed states are off by a factor."""
    with pytest.MonkeyPatch.context() as patch:
        drifting(patch, torch.zeros((), dtype=torch.float64)).fill_(factor)
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
    with wrong_states(factor):
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
        sequence, (x, _) = CASE.build(), CASE.batch()  # not told to defer
        with like_a_gpu():
            alone = step_gradients(sequence, x)
            graph = Replayed(monkeypatch, sequence, x)
            report = sequence.memory_report()
            assert (report["passes"], report["trips"]) == (1, 0), "a capture is no pass"
            expected = graph.replay()
            assert worst_error(expected, alone) < 1e-9  # what is recorded is not computed by csrc/run
            assert all_zero(graph.replay(1.001))
            assert all_zero(graph.replay(float("nan")))
            assert same(graph.replay(), expected)
            report = sequence.memory_report()
            assert (report["passes"], report["trips"], report["skipped"]) == (5, 2, 2)
            assert report["anchor_every"] == 2
            assert all_zero(graph.replay(1.001))
            assert sequence.memory_report()["skipped"] == 3
            assert sequence.control.spacing == 2, "the graph's own anchors are where they were"

    def test_a_capture_without_a_step_before_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, (x, _) = CASE.build(), CASE.batch()
        step_gradients(sequence, x)  # not as on a GPU: no counters
        expected = "CUDA graph: expected a step run before .*, found a capture that begins without counters of drift"
        with like_a_gpu(), pytest.raises(ValueError, match=expected):
            Replayed(monkeypatch, sequence, x)

    def test_a_verdict_that_is_under_way_is_not_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class UnderWay(Later):
            def read(self) -> list[float] | None:
                raise NotCapturableError("an event is asked")

        sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
        with like_a_gpu():
            step_gradients(sequence, x)
            with monkeypatch.context() as patch:
                patch.setattr(deferred, "Later", UnderWay)
                step_gradients(sequence, x)
            graph = Replayed(monkeypatch, sequence, x)
            graph.replay()
            assert sequence.memory_report()["passes"] == 3

    def test_steps_of_the_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, sequence = torch.randn(2, 4, 3, 2, dtype=torch.float64), user_steps(False)
        with like_a_gpu():
            expected = step_gradients(sequence, x)
            with Recording() as graph, capturing():
                found = step_gradients(sequence, x)
            graph.replay()
            assert same(found, expected)
            assert sequence.memory_report()["passes"] == 2

    def test_a_pass_that_keeps_all_states_is_none_while_captured(self) -> None:
        sequence, (x, _) = CASE.build(anchor_every=1), CASE.batch()
        with like_a_gpu():
            step_gradients(sequence, x)
            assert sequence.memory_report()["passes"] == 1
            with Recording(), capture_guard():
                step_gradients(sequence, x)
            assert sequence.memory_report()["passes"] == 1

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
    @pytest.mark.cuda
    def test_on_a_gpu(self) -> None:
        """As a user captures a step: torch.cuda.graph, after a step on another stream."""
        sequence, x = CASE.build().cuda(), CASE.batch()[0].cuda()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            expected = step_gradients(sequence, x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with pytest.MonkeyPatch.context() as patch:
            factor = drifting(patch, x)
            with torch.cuda.graph(graph, stream=side):
                found = step_gradients(sequence, x)
        for _ in range(3):
            factor.fill_(1.0)
            graph.replay()
            assert worst_error(found, expected) < 1e-9
            factor.fill_(1.001)
            graph.replay()
            assert all_zero(found)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"], report["skipped"]) == (7, 3, 3)


def test_a_capture_without_verdicts_before_is_told_of_in_the_forward() -> None:
    control = DriftControl(8)
    control.prepare(torch.device("cpu"))  # no graphs there, none deferred
    assert control.zeroed(torch.device("cpu")) is None
    with like_a_gpu():
        control.prepare(torch.device("cpu"))
        with capturing():
            control.prepare(torch.device("cpu"))
    assert float(control.zeroed(torch.device("cpu"))) == 0.0  # type: ignore[arg-type]


def test_a_copy_that_is_under_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Later):
        ready = False

        def read(self) -> list[float] | None:
            return super().read() if self.ready else None

    monkeypatch.setattr(deferred, "Later", Slow)
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    gradients(sequence, x)
    sequence.control.settle()
    assert sequence.control.learnt.passes == 0
    Slow.ready = True
    sequence.control.settle()
    sequence.control.settle()
    assert sequence.control.learnt.passes == 1


def test_a_loaded_record_knows_nothing_of_passes_before() -> None:
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    saved = sequence.control.state()
    gradients(sequence, x)
    sequence.control.load_state(saved)
    assert sequence.memory_report()["passes"] == 0


def test_copies_take_nothing_that_is_under_way() -> None:
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    gradients(sequence, x)
    other = copy.deepcopy(sequence)
    assert other.memory_report()["passes"] == 0
    assert sequence.memory_report()["passes"] == 1
    assert sequence.control.learnt.passes == 1


def test_threads_take_each_verdict_once() -> None:
    class Slow(list[int]):
        """Gives another thread time to read the same counts."""

        def __iter__(self) -> Iterator[int]:
            time.sleep(0.1)
            return super().__iter__()

    verdicts = deferred.Verdicts()
    verdicts.add(torch.tensor(0.0), torch.tensor(False), 1.0, 2)
    verdicts._known = Slow([0, 0, 0])
    with ThreadPoolExecutor(2) as pool:
        assert sum(len(found) for found in pool.map(verdicts.take, [True, True])) == 1


def test_frequent_losses_are_warned_of() -> None:
    control = DriftControl(8, 4, deferred=True)
    for _ in range(15):
        control.record(1.0, 1e-6, 0, 4, drifted=True, skipped=True)
    with pytest.warns(UserWarning, match="lost, with all gradients"):
        control.record(1.0, 1e-6, 0, 4, drifted=True, skipped=True)


def test_flags_are_forgotten_with_their_backward() -> None:
    """They may lie in a graph's own memory."""
    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    gradients(sequence, x)
    assert not deferred._flags


def test_flags_of_backwards_that_fail_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("planted")

    sequence, (x, _) = CASE.build(deferred_check=True), CASE.batch()
    monkeypatch.setattr(run, "accepted", fails)
    for _ in range(deferred.REMEMBERED + 3):
        with pytest.raises(RuntimeError, match="planted"):
            gradients(sequence, x)
    assert len(deferred._flags) == deferred.REMEMBERED
    deferred._flags.clear()


def test_option_is_a_bool() -> None:
    with pytest.raises(ValueError, match="deferred_check: expected a bool, found 'yes'"):
        pgf.ReversibleSequence([pgf.FlowStep(4, 5)], deferred_check="yes")
