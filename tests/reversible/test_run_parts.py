"""A run of steps cut into parts gives the gradients of the uncut one, and is judged as one."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.chain_cases import (
    CASES,
    EVERY_STEP,
    ONE_PART,
    Case,
    Mode,
    assert_same_gradients,
    counted_runs,
    cut_parts,
    fold_by,
    gradients,
    noted_passes,
    objective,
)
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast.reversible import DriftControl, Pass, backward, passes
from pyglow_fast.reversible.parts import LEAST_PART, cut, part_limit

CASE = next(case for case in CASES if case.name == "depth-8")
CONDITIONED = Case("conditioned", 8, cond_shape=(2, 6, 3))


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


def test_the_limit_of_a_part() -> None:
    """sqrt(boundary sum), where the gradients of one part and what lies between all parts are equally many bytes."""
    x, sizes = torch.zeros(1), [10**6] * 64
    assert part_limit(x, sizes) == part_limit(x, [1]) == LEAST_PART
    limit = part_limit(x, sizes, 10**6)
    assert limit == 8 * 10**6
    parts = cut(sizes, range(1, 64), limit)
    assert max(end - first for first, end in parts) * 10**6 == limit == len(parts) * 10**6


@pytest.mark.parametrize(
    ("limit", "ends", "knows_starts", "parts", "anchors"),
    [
        (40, None, False, [(0, 4), (4, 8), (8, 9)], [2, 4, 6, 8]),  # at anchors alone
        (30, None, False, [(0, 2), (2, 4), (4, 6), (6, 9)], [2, 4, 6, 8]),
        (30, [], False, [(0, 3), (3, 6), (6, 9)], [2, 4, 6, 8]),  # anywhere
        (30, [5], False, [(0, 3), (3, 5), (5, 8), (8, 9)], [2, 4, 6, 8]),  # and there for certain
        (30, [5], True, [(0, 3), (3, 5), (5, 8), (8, 9)], [2, 3, 4, 5, 6, 8]),
        (None, [5], False, [(0, 5), (5, 9)], [2, 4, 6, 8]),
    ],
    ids=str,
)
def test_parts_and_anchors_of_a_pass(
    limit: int | None,
    ends: list[int] | None,
    knows_starts: bool,
    parts: list[tuple[int, int]],
    anchors: list[int],
) -> None:
    whole = Pass(DriftControl(9, 2), [10] * 9, limit, ends, knows_starts)
    assert [(part.first, part.end) for part in whole.parts] == parts
    assert whole.anchors == anchors
    assert [part.knows_start for part in whole.parts] == [first in [0, *anchors] for first, _ in parts]
    assert [part.is_last for part in whole.parts] == [end == 9 for _, end in parts]


def test_anchors_of_a_part_are_counted_from_its_first_step() -> None:
    whole = Pass(DriftControl(9, 2), [10] * 9, 40)
    assert whole.anchors == [2, 4, 6, 8]
    assert [(part.first, part.end, part.anchors) for part in whole.parts] == [(0, 4, [2]), (4, 8, [2]), (8, 9, [])]
    anywhere = Pass(DriftControl(9, 4), [10] * 9, 30, [])
    assert [(part.first, part.end, part.anchors) for part in anywhere.parts] == [(0, 3, []), (3, 6, [1]), (6, 9, [2])]


def user_steps() -> pgf.ReversibleSequence:
    steps: list[nn.Module] = [pgf.ActNorm(4), *(pgf.FlowStep(4, 5) for _ in range(5)), pgf.InvConv(4)]
    sequence = pgf.ReversibleSequence(steps, anchor_every=2, tolerance=1e-9).double()
    sequence.initialize(torch.randn(8, 4, 6, 3, dtype=torch.float64))
    return sequence


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """The passes that runs of steps have made."""
    return noted_passes(monkeypatch)


@pytest.mark.parametrize("mode", [Mode("checkpoint"), Mode("reversible", 3), Mode("reversible", 1)], ids=str)
@pytest.mark.parametrize("user", [False, True])
def test_gradients_are_those_of_the_uncut_run(
    user: bool, mode: Mode, noted: list[Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the same operations. A user's steps are cut at anchors alone."""
    sequence = user_steps() if user else CASE.build(tolerance=1e-9)
    x = torch.randn(3, 4, 6, 3, dtype=torch.float64)
    found, parts = {}, {}
    for limit in (ONE_PART, EVERY_STEP):
        cut_parts(monkeypatch, limit)
        mode.apply(sequence)
        found[limit] = gradients(sequence, x)
        parts[limit] = len(noted[-1].parts)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"]) == (1 if mode.memory == "reversible" else 0, 0)
    assert parts == {ONE_PART: 1, EVERY_STEP: 3 if user and mode.anchor_every == 3 else len(sequence)}
    assert found[ONE_PART].keys() == found[EVERY_STEP].keys()
    for name, grad in found[ONE_PART].items():
        assert torch.equal(found[EVERY_STEP][name], grad), name


@pytest.mark.parametrize("mode", [Mode("checkpoint", budget=1), Mode("reversible", None, 1)], ids=str)
def test_an_uncut_run_of_nets_in_chunks(mode: Mode, noted: list[Pass], monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two nets the gradients of the matrix and the offset are sums over the chunks of the second."""
    cut_parts(monkeypatch, ONE_PART)
    sequence, (x, _) = CASE.build(tolerance=1e-30), CASE.batch()  # what could be inverted is redone
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)
    assert [len(whole.parts) for whole in noted] == [1]


class TestRedone:
    """A drift in one part: the gradient is right, and the parts between the anchor and it are done again with it."""

    def planted(self, monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
        """The state that the inversion of step ``at`` of 0..7 gives is wrong; an item for each inversion."""
        true, seen = passes.step_backward, []

        def wrong(*inputs: Any) -> tuple[Tensor, ...]:
            found, *grads = true(*inputs)
            seen.append(7 - len(seen))  # the step: none before this one is redone
            return (1.01 * found if seen[-1] == at else found, *grads)

        monkeypatch.setattr(passes, "step_backward", wrong)
        return seen

    @pytest.mark.full
    @pytest.mark.parametrize("groups", [0, 1, 2, 3])
    @pytest.mark.parametrize("cond", [False, True])
    @pytest.mark.parametrize(
        ("steps", "every", "at", "first"),
        [
            (1, None, 6, 0),  # its own first step, which a sketch tells of, far from the run's input
            (1, None, 4, 0),  # of three parts whose maps are folded together the one in the middle
            (1, None, 1, 0),
            (1, None, 0, 0),  # the run's input, which is known
            (1, 4, 7, 4),  # behind an anchor that begins another part
            (1, 4, 4, 4),  # the anchor itself
            (3, None, 7, 0),  # parts 0..2, 3..5, 6, 7: in the middle, which a projection tells of
            (3, None, 4, 0),
            (3, 5, 7, 5),  # an anchor in the middle of the part before
            (3, 4, 5, 4),
            (3, 7, 4, 0),
        ],
        ids=str,
    )
    def test_a_planted_drift(
        self,
        steps: int,
        every: int | None,
        at: int,
        first: int,
        cond: bool,
        groups: int,
        noted: list[Pass],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        case = CONDITIONED if cond else CASE
        sequence, (x, given) = case.build(), case.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x, given)
        sequence.control.tolerance = 1e-9
        if groups:
            fold_by(monkeypatch, groups)
        cut_parts(monkeypatch, 0, steps)
        Mode("reversible", every).apply(sequence)
        inverted = self.planted(monkeypatch, at)
        assert_same_gradients(gradients(sequence, x, given), expected)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"]) == (1, 1)
        assert 1e-3 < report["last_drift"] < 1e-1
        part = next(part for part in noted[-1].parts if part.first <= at < part.end)
        bounds = [part.first, *(part.first + k for k in part.anchors), part.end]
        start, end = next((a, b) for a, b in pairwise(bounds) if a <= at < b)
        assert first == max((k for k in (0, *noted[-1].anchors) if k <= start), default=0)
        assert report["redone_steps"] == end - first
        assert len(inverted) == 8 - (start - first), "what a redo has made known is not inverted"

    def test_the_parts_between_are_checkpointed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Step 6 of 0..7 drifts in its part; steps 0..5 run forward once, and back once, as where states are kept."""
        cut_parts(monkeypatch, EVERY_STEP)
        sequence, (x, _) = CASE.build(tolerance=1e-9), CASE.batch()
        Mode("reversible", None, 2**40).apply(sequence)
        inverted = self.planted(monkeypatch, 6)
        value = objective(sequence(x))
        with counted_runs(sequence) as runs:
            value.backward()
        order = [int(name.split(".")[0]) for name in runs]
        assert order == [7, 6, *range(6), 6, *reversed(range(6))]
        assert inverted == [7, 6]
        assert sequence.memory_report()["redone_steps"] == 7

    def test_judged_as_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The control hears of the pass once, again and again; what was known of one backward is not of the next."""
        cut_parts(monkeypatch, EVERY_STEP)
        sequence, (x, _) = CASE.build(), CASE.batch()
        Mode("store").apply(sequence)
        sequence.control.tolerance = 1e-9
        expected = gradients(sequence, x)
        Mode("reversible", 3).apply(sequence)
        inverted = self.planted(monkeypatch, 4)
        leaf = x.clone().requires_grad_()
        value = objective(sequence(leaf))
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        assert torch.allclose(first, expected["x"], rtol=1e-9, atol=1e-12)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"], report["redone_steps"]) == (1, 1, 2)
        assert 1e-3 < report["last_drift"] < 1e-1
        assert len(inverted) == 7, "step 3 was redone with it"
        (second,) = torch.autograd.grad(value, leaf)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"]) == (2, 1)
        assert report["last_drift"] < 1e-9
        assert torch.allclose(second, expected["x"], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("tolerance", [1e-9, 1e-30])
    def test_deferred(self, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """All parts invert; what has drifted makes its own gradients zero, and those of the parts before it."""
        cut_parts(monkeypatch, EVERY_STEP)
        sequence, (x, _) = CASE.build(), CASE.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        Mode("reversible", 3).apply(sequence)
        sequence.control.tolerance, sequence.control.deferred = tolerance, True
        found = gradients(sequence, x)
        report = sequence.memory_report()
        assert (report["passes"], report["redone_steps"]) == (1, 0)
        drifted = tolerance < 1e-20
        assert (report["trips"], report["skipped"]) == (drifted, drifted)
        if drifted:
            assert not found["x"].any()
            assert not any(grad.any() for name, grad in found.items() if name.startswith("0."))
        else:
            assert_same_gradients(found, expected)

    def test_a_drift_that_the_sketch_alone_sees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without it the gradient is wrong."""
        cut_parts(monkeypatch, EVERY_STEP)
        sequence, (x, _) = CASE.build(tolerance=1e-9), CASE.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        Mode("reversible", None).apply(sequence)
        monkeypatch.setattr(backward, "witness_drift", lambda *_: torch.zeros((), dtype=torch.float64))
        self.planted(monkeypatch, 5)
        # The wrong state is handed on, and the run's own input tells at last: too late for the steps behind.
        with pytest.raises(AssertionError, match="relative error"):
            assert_same_gradients(gradients(sequence, x), expected)


@pytest.mark.parametrize("user", [False, True])
def test_first_parts_without_a_gradient(user: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward does not reach them, and the pass is counted all the same."""
    cut_parts(monkeypatch, EVERY_STEP)
    sequence = user_steps() if user else CASE.build(tolerance=1e-9)
    Mode("reversible", 2).apply(sequence)
    for step in list(sequence)[:3]:
        step.requires_grad_(False)
    objective(sequence(torch.randn(3, 4, 6, 3, dtype=torch.float64))).backward()
    assert sequence.memory_report()["passes"] == 1
    assert all((p.grad is not None) == p.requires_grad for p in sequence.parameters())


@pytest.mark.parametrize("groups", [0, 1, 2, 3])
@pytest.mark.parametrize("at", [3, 4, 7])
def test_a_drift_behind_parts_without_a_gradient(at: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps 0..2, which are frozen, nothing is kept: the input of the first that is trained is."""
    sequence, (x, _) = CASE.build(), CASE.batch()
    for step in list(sequence)[:3]:
        step.requires_grad_(False)
    Mode("store").apply(sequence)
    objective(sequence(x)).backward()
    wanted = {name: p.grad for name, p in sequence.named_parameters() if p.requires_grad}
    sequence.zero_grad()
    sequence.control.tolerance = 1e-9
    if groups:
        fold_by(monkeypatch, groups)
    cut_parts(monkeypatch, EVERY_STEP)
    Mode("reversible", None).apply(sequence)
    TestRedone().planted(monkeypatch, at)
    objective(sequence(x)).backward()
    assert_same_gradients({name: p.grad for name, p in sequence.named_parameters() if p.requires_grad}, wanted)
    report = sequence.memory_report()
    # A part whose step is frozen has a backward where it gives the gradients of maps that are folded with its own.
    first = {0: 0, 1: 3, 2: 2, 3: 3}[groups]
    assert (report["passes"], report["trips"], report["redone_steps"]) == (1, 1, at + 1 - first), report


def test_gradients_that_are_added_to_others_exist_twice_by_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps = pgf.ReversibleSequence([pgf.FlowStep(4, 64) for _ in range(16)], anchor_every=2)
    x = torch.randn(1, 4, 4, 4)
    steps.initialize(torch.randn(8, 4, 4, 4))
    size = sum(p.nbytes for p in steps.parameters())
    peaks = {}
    for limit in (ONE_PART, EVERY_STEP):
        cut_parts(monkeypatch, limit)
        model = copy.deepcopy(steps)
        objective(model(x)).backward()
        with MemoryMeter() as meter:
            objective(model(x)).backward()
        peaks[limit] = meter.peak
    assert peaks[ONE_PART] > size > 4 * peaks[EVERY_STEP]


@pytest.mark.full
def test_a_compiled_run_is_cut_alike() -> None:
    """A plan reckons with the parts and groups that there are without torch.compile."""
    torch.manual_seed(0)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 512) for _ in range(4)]).eval()
    x = torch.randn(1, 4, 4, 4)

    def parts_of(call: Any) -> int:
        node, names = call(x)[0].grad_fn, []
        while node is not None:
            names.append(node.name())
            node = next((of for of, _ in node.next_functions if of is not None and "_RunPart" in of.name()), None)
        return sum("_RunPart" in name for name in names)

    assert parts_of(torch.compile(sequence, backend="eager")) == parts_of(sequence) > 1
