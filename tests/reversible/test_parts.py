"""How runs are cut into parts, each a node of its own, and which of their states are kept."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from support.chain_cases import (
    CASES,
    EVERY_STEP,
    ONE_PART,
    Mode,
    assert_same_gradients,
    cut_parts,
    gradients,
    objective,
)
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast._backend import extension
from pyglow_fast.reversible import DriftControl
from pyglow_fast.reversible.parts import LEAST_PART, Whole, part_limit
from pyglow_fast.reversible.run import no_maps


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([10] * 6, 20, [(0, 2), (2, 4), (4, 6)]),
        ([10] * 6, 1, [(k, k + 1) for k in range(6)]),
        ([10] * 6, 60, [(0, 6)]),
        ([10] * 6, None, [(0, 6)]),
        ([50, 1, 1, 50], 52, [(0, 3), (3, 4)]),
        ([10], 0, [(0, 1)]),
    ],
    ids=str,
)
def test_cut(sizes: list[int], limit: int | None, expected: list[tuple[int, int]]) -> None:
    assert no_maps(len(sizes)).bounds(sizes, limit, 2**20) == expected


def test_the_limit_of_a_part() -> None:
    """sqrt(between sum), where the gradients of one part and what lies between all parts are equally many bytes."""
    x, sizes = torch.zeros(1), [10**6] * 64
    assert part_limit(x, sizes, 0) == part_limit(x, [1], 1) == LEAST_PART
    limit = part_limit(x, sizes, 10**6)
    assert limit == 8 * 10**6
    parts = no_maps(64).bounds(sizes, limit, 2**20)
    assert max(end - first for first, end in parts) * 10**6 == limit == len(parts) * 10**6


@pytest.mark.parametrize(
    ("bounds", "knows_starts", "anchors", "of_parts"),
    [
        ([(0, 9)], False, [2, 4, 6, 8], [[2, 4, 6, 8]]),
        ([(0, 3), (3, 6), (6, 9)], False, [2, 4, 6, 8], [[2], [1], [2]]),
        ([(0, 3), (3, 6), (6, 9)], True, [2, 3, 4, 6, 8], [[2], [1], [2]]),
    ],
    ids=str,
)
def test_anchors(
    bounds: list[tuple[int, int]], knows_starts: bool, anchors: list[int], of_parts: list[list[int]]
) -> None:
    """Those of a part are counted from its first step, which is none of them."""
    whole = Whole(DriftControl(9, 2), bounds, knows_starts)
    assert whole.anchors == anchors
    assert [(part.first, part.end) for part in whole.parts] == bounds
    assert [part.anchors for part in whole.parts] == of_parts
    assert [part.knows_start for part in whole.parts] == [first in [0, *anchors] for first, _ in bounds]
    assert [part.is_last for part in whole.parts] == [end == 9 for _, end in bounds]


@pytest.mark.parametrize("user", [False, True])
def test_first_parts_without_a_gradient(user: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward does not reach them, and the pass is counted all the same."""
    cut_parts(monkeypatch, EVERY_STEP)
    own: list[nn.Module] = [pgf.FlowStep(4, 5) for _ in range(5)]
    steps = [pgf.ActNorm(4), *own, pgf.InvConv(4)] if user else own
    sequence = pgf.ReversibleSequence(steps, anchor_every=2, tolerance=1e-9).double()
    sequence.initialize(torch.randn(8, 4, 6, 3, dtype=torch.float64))
    for step in list(sequence)[:3]:
        step.requires_grad_(False)
    objective(sequence(torch.randn(3, 4, 6, 3, dtype=torch.float64))).backward()
    assert sequence.memory_report()["passes"] == 1
    assert all((p.grad is not None) == p.requires_grad for p in sequence.parameters())


@pytest.mark.parametrize("user", [False, True])
def test_gradients_that_are_added_to_others_exist_twice_by_parts_alone(
    user: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    own: list[nn.Module] = [pgf.FlowStep(4, 64) for _ in range(16)]
    steps = pgf.ReversibleSequence([*own, pgf.InvConv(4)] if user else own, anchor_every=4)
    x = torch.randn(1, 4, 4, 4)
    steps.initialize(torch.randn(8, 4, 4, 4))
    size = sum(p.nbytes for p in steps.parameters())
    peaks = {}
    for limit in (ONE_PART, EVERY_STEP):
        cut_parts(monkeypatch, limit)
        model = copy.deepcopy(steps)
        Mode("reversible", 4).apply(model)
        objective(model(x)).backward()
        with MemoryMeter() as meter:
            objective(model(x)).backward()
        peaks[limit] = meter.peak
    assert peaks[ONE_PART] > size > 4 * peaks[EVERY_STEP]


@pytest.mark.full
@pytest.mark.skipif(extension() is None, reason="the parts of the compiled run hand states on")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", [Mode("checkpoint"), Mode("reversible", None), Mode("reversible", 3)], ids=str)
class TestBackwards:
    """More than one backward through one graph, or one that is not the whole: each has the states of its own."""

    def graph(
        self, mode: Mode, steps: int, patch: pytest.MonkeyPatch
    ) -> tuple[pgf.ReversibleSequence, Tensor, dict[str, Tensor]]:
        """A run in parts of so many steps, its input that wants a gradient, and the stored gradients."""
        cut_parts(patch, EVERY_STEP, steps)
        case = next(case for case in CASES if case.name == "depth-8")
        sequence, (x, _) = case.build(tolerance=1e-11), case.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        mode.apply(sequence)
        return sequence, x.requires_grad_(), expected

    def of_all(self, sequence: pgf.ReversibleSequence, x: Tensor, value: Tensor) -> dict[str, Tensor]:
        named = {"x": x, **dict(sequence.named_parameters())}
        return dict(zip(named, torch.autograd.grad(value, list(named.values()), retain_graph=True), strict=True))

    def test_late_gradients_alone_and_then_all(self, mode: Mode, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, x, expected = self.graph(mode, steps, monkeypatch)
        value = objective(sequence(x))
        for k in (7, 4):
            for name in (f"{k}.coupling.net.conv1.weight", f"{k}.actnorm.bias", f"{k}.permutation.upper"):
                (found,) = torch.autograd.grad(value, sequence.get_parameter(name), retain_graph=True)
                assert_same_gradients({name: found}, {name: expected[name]})
        assert sequence.memory_report()["passes"] == 0
        for passes in (1, 2):
            assert_same_gradients(self.of_all(sequence, x, value), expected)
            assert sequence.memory_report()["passes"] == passes * (mode.memory == "reversible")

    def test_a_batch_of_gradients(self, mode: Mode, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, x, _ = self.graph(mode, steps, monkeypatch)
        z, log_det = sequence(x)
        rows = torch.randn(3, *z.shape, dtype=torch.float64), torch.randn(3, *log_det.shape, dtype=torch.float64)
        inputs = [x, *sequence.parameters()]
        at_once = torch.autograd.grad((z, log_det), inputs, rows, is_grads_batched=True, retain_graph=True)
        Mode("store").apply(sequence)
        z, log_det = sequence(x)
        for i in range(3):
            one = torch.autograd.grad((z, log_det), inputs, [row[i] for row in rows], retain_graph=True)
            for found, wanted in zip(at_once, one, strict=True):
                assert_same_gradients({"": found[i]}, {"": wanted})

    def test_in_two_threads_at_a_time(self, mode: Mode, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, x, expected = self.graph(mode, steps, monkeypatch)
        value = objective(sequence(x))
        gate, true = threading.Barrier(2, timeout=30), Whole.take
        found: list[Any] = []

        def in_the_middle(whole: Whole, part: Any) -> Tensor | None:
            gate.wait()  # each is in the middle of its backward while the other is
            return true(whole, part)

        def run() -> None:
            try:
                found.append(self.of_all(sequence, x, value))
            except BaseException as error:
                gate.abort()
                found.append(error)

        monkeypatch.setattr(Whole, "take", in_the_middle)
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in found:
            assert_same_gradients(one, expected)

    def test_after_one_that_failed(self, mode: Mode, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        sequence, x, expected = self.graph(mode, steps, monkeypatch)
        value = objective(sequence(x))
        with monkeypatch.context() as patch:
            calls: list[int] = []

            def failing(*_: Any) -> None:
                calls.append(0)
                if len(calls) == 2:
                    raise MemoryError("planted")

            for method in ("judged", "checkpointed"):
                true = getattr(Whole, method)
                patch.setattr(Whole, method, lambda *given, true=true: (failing(), true(*given))[1])  # type: ignore[func-returns-value]
            with pytest.raises(MemoryError, match="planted"):
                self.of_all(sequence, x, value)
        assert_same_gradients(self.of_all(sequence, x, value), expected)
