"""A run of steps cut into parts gives the gradients of the uncut one, and is judged as one."""

from __future__ import annotations

import copy

import pytest
import torch
from support.chain_cases import CASES, Mode, assert_same_gradients, gradients, objective
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import MemoryTrace
from pyglow_fast.layers import reversible_sequence
from pyglow_fast.reversible import DriftControl, Pass, passes
from pyglow_fast.reversible.parts import cut

CASE = next(case for case in CASES if case.name == "depth-8")
EVERY_CUT, NO_CUT = 10**9, 1  # of the budget's share for gradients


@pytest.mark.parametrize(
    ("sizes", "places", "limit", "expected"),
    [
        ([10] * 6, [1, 2, 3, 4, 5], 20, [(0, 2), (2, 4), (4, 6)]),
        ([10] * 6, [1, 2, 3, 4, 5], 1, [(k, k + 1) for k in range(6)]),
        ([10] * 6, [2, 4], 1, [(0, 2), (2, 4), (4, 6)]),
        ([10] * 6, [2, 4], 40, [(0, 4), (4, 6)]),
        ([10] * 6, [], 1, [(0, 6)]),
        ([10] * 6, [3], 60, [(0, 6)]),
        ([50, 1, 1, 50], [1, 2, 3], 52, [(0, 3), (3, 4)]),
        ([10], [], 0, [(0, 1)]),
    ],
    ids=str,
)
def test_cut(sizes: list[int], places: list[int], limit: int, expected: list[tuple[int, int]]) -> None:
    assert cut(sizes, places, limit) == expected


def test_anchors_of_a_part_are_counted_from_its_first_step() -> None:
    whole = Pass(DriftControl(9, 2), [10] * 9, 40)
    assert whole.anchors == [2, 4, 6, 8]
    assert [(part.first, part.end, part.anchors) for part in whole.parts] == [(0, 4, [2]), (4, 8, [2]), (8, 9, [])]


def user_steps() -> pgf.ReversibleSequence:
    steps: list[nn.Module] = [pgf.ActNorm(4), *(pgf.FlowStep(4, 5) for _ in range(5)), pgf.InvConv(4)]
    sequence = pgf.ReversibleSequence(steps, anchor_every=2, tolerance=1e-9).double()
    sequence.initialize(torch.randn(8, 4, 6, 3, dtype=torch.float64))
    return sequence


def parts_of(sequence: pgf.ReversibleSequence, x: Tensor) -> int:
    step_bytes = [sum(parameter.nbytes for parameter in step.parameters()) for step in sequence]
    return len(sequence._pass(x, step_bytes).parts)


@pytest.mark.parametrize("mode", [Mode("checkpoint"), Mode("reversible", 3), Mode("reversible", 1)], ids=str)
@pytest.mark.parametrize("user", [False, True])
def test_gradients_are_those_of_the_uncut_run(user: bool, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = user_steps() if user else CASE.build(tolerance=1e-9)
    x = torch.randn(3, 4, 6, 3, dtype=torch.float64)
    found, parts = {}, {}
    for share in (NO_CUT, EVERY_CUT):
        monkeypatch.setattr(reversible_sequence, "GRADIENT_SHARE", share)
        mode.apply(sequence)
        parts[share] = parts_of(sequence, x)
        found[share] = gradients(sequence, x)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"]) == (1 if mode.memory == "reversible" else 0, 0)
    assert parts == {NO_CUT: 1, EVERY_CUT: 3 if mode.anchor_every == 3 else len(sequence)}
    assert found[NO_CUT].keys() == found[EVERY_CUT].keys()
    for name, grad in found[NO_CUT].items():
        assert torch.equal(found[EVERY_CUT][name], grad), name


@pytest.mark.parametrize("mode", [Mode("checkpoint", budget=1), Mode("reversible", None, 1)], ids=str)
def test_an_uncut_run_of_nets_in_chunks(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two nets the gradients of the matrix and the offset are sums over the chunks of the second."""
    monkeypatch.setattr(reversible_sequence, "GRADIENT_SHARE", 1e-9)  # one part, though 1 byte cuts the nets
    sequence, (x, _) = CASE.build(tolerance=1e-30), CASE.batch()  # what could be inverted is redone
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert parts_of(sequence, x) == 1
    assert_same_gradients(gradients(sequence, x), expected)


def test_judged_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment that drifts is redone within its part; the control hears of the pass once, again and again."""
    monkeypatch.setattr(reversible_sequence, "GRADIENT_SHARE", EVERY_CUT)
    sequence, (x, _) = CASE.build(), CASE.batch()
    Mode("store").apply(sequence)
    sequence.control.tolerance = 1e-9
    Mode("reversible", 3).apply(sequence)
    expected = gradients(sequence, x)
    true, calls = passes.step_backward, []

    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        found, *grads = true(*inputs)
        calls.append(0)
        return (1.01 * found if len(calls) == 4 else found, *grads)  # step 4 of 0..7, in the part 3..5

    monkeypatch.setattr(passes, "step_backward", wrong)
    Mode("reversible", 3).apply(sequence)
    leaf = x.clone().requires_grad_()
    value = objective(sequence(leaf))
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    assert torch.allclose(first, expected["x"], rtol=1e-9, atol=1e-12)
    report = sequence.memory_report()
    assert (report["passes"], report["trips"], report["redone_steps"]) == (1, 1, 2)
    assert 1e-3 < report["last_drift"] < 1e-1
    (second,) = torch.autograd.grad(value, leaf)
    report = sequence.memory_report()
    assert (report["passes"], report["trips"]) == (2, 1)
    assert report["last_drift"] < 1e-9
    assert torch.allclose(second, expected["x"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("user", [False, True])
def test_first_parts_without_a_gradient(user: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward does not reach them, and the pass is counted all the same."""
    monkeypatch.setattr(reversible_sequence, "GRADIENT_SHARE", EVERY_CUT)
    sequence = user_steps() if user else CASE.build(tolerance=1e-9)
    Mode("reversible", 2).apply(sequence)
    for step in list(sequence)[:3]:
        step.requires_grad_(False)
    objective(sequence(torch.randn(3, 4, 6, 3, dtype=torch.float64))).backward()
    assert sequence.memory_report()["passes"] == 1
    assert all((p.grad is not None) == p.requires_grad for p in sequence.parameters())


def test_gradients_that_are_added_to_others_exist_twice_by_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps = pgf.ReversibleSequence([pgf.FlowStep(4, 64) for _ in range(16)], anchor_every=2)
    x = torch.randn(1, 4, 4, 4)
    steps.initialize(torch.randn(8, 4, 4, 4))
    size = sum(p.nbytes for p in steps.parameters())
    peaks = {}
    for share in (NO_CUT, EVERY_CUT):
        monkeypatch.setattr(reversible_sequence, "GRADIENT_SHARE", share)
        model = copy.deepcopy(steps)
        objective(model(x)).backward()
        with MemoryTrace() as trace:
            objective(model(x)).backward()
        peaks[share], _ = trace.peak_without()
    assert peaks[NO_CUT] > size > 4 * peaks[EVERY_CUT]
