"""The memory benchmark counts what it says, compares the same function, and does not pass what it has not measured."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from bench import memory, memory_case, memory_gradients, memory_models, memory_plots
from bench.memory_meter import AllocatorTrace, MemoryMeter, MemoryTrace
from pyglow_fast import Glow

CPU = torch.device("cpu")
TINY = memory_models.Shape((3, 16, 16), 2, 2, 8, 2)
KB = 1000


def kb(count: int) -> torch.Tensor:
    return torch.zeros(count * 250)


class TestMeter:
    def test_allocator_follows_a_resize_by_hand(self) -> None:
        with AllocatorTrace() as trace:
            first = kb(4)
            first.untyped_storage().resize_(0)
            second = kb(5)
            del first, second
        assert trace.peak_without() == 5 * KB

    def test_allocator_sees_inside_ops(self) -> None:
        x = torch.ones(4, 250)

        def run() -> torch.Tensor:
            return torch.logsumexp(x, dim=1)  # keeps exp(x - max) of 4 kB for itself

        with AllocatorTrace() as trace, MemoryMeter() as meter:
            run()
        assert meter.peak < 4 * KB <= trace.peak_without()

    def test_allocator_without_some(self) -> None:
        old = kb(7)
        with AllocatorTrace() as trace:
            short = kb(3)
            del old, short
            kept = kb(10)
        assert trace.peak_without() == 10 * KB  # to free what existed before makes no room
        assert trace.peak_without([kept]) == 3 * KB
        assert kept.numel()

    def test_peak_without_some(self) -> None:
        with MemoryTrace() as trace:
            kept = kb(10)
            short = kb(3)
            del short
            kb(2)
        peak, parts = trace.peak_without()
        assert peak == trace.peak == 13 * KB
        assert [(part.size, part.number) for part in parts] == [(10 * KB, 1), (3 * KB, 1)]
        assert trace.peak_without([kept])[0] == 3 * KB
        assert trace.peak_without([torch.zeros(3)])[0] == 13 * KB  # made elsewhere


class TestModels:
    @pytest.mark.parametrize("implementation", memory_models.IMPLEMENTATIONS)
    def test_the_same_function_has_the_same_gradients(self, implementation: str) -> None:
        try:
            model = memory_models.build(implementation, TINY, "auto", CPU).double()
        except ImportError as error:
            pytest.skip(str(error))
        x = memory_models.images(TINY, CPU).double()
        memory_case.training_step(model, x)()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(bool(grad.any()) for grad in found), "a net that puts out nothing hides most gradients"
        if implementation in memory_models.OTHERS:
            return
        exact_model = memory_models.build("store", TINY, "auto", CPU).double()
        memory_case.training_step(exact_model, x)()
        exact = [parameter.grad for parameter in exact_model.parameters() if parameter.grad is not None]
        assert max(memory_case.gradient_error(found, exact)) < 1e-10

    def test_initialised_on_small_images(self) -> None:
        model = memory_models.build("reversible", TINY, 12345, CPU)
        assert isinstance(model, Glow)
        assert model.is_initialized
        assert {level.steps.memory_budget for level in model.levels} == {12345}


class TestCase:
    def test_text(self) -> None:
        case = memory_case.Case("store", TINY, budget=7, errors=True)
        assert memory_case.Case.of(case.text()) == case

    @pytest.mark.parametrize("implementation", ["plain", "reversible"])
    def test_measures(self, implementation: str) -> None:
        result = memory_case.run_case(memory_case.Case(implementation, TINY, passes=2, errors=True))
        # A state of each of the first level's steps, at least, is alive in either.
        assert result["tensor_bytes"] > 4 * 2 * 12 * 64
        assert 0 < result["tensor_bytes_fresh"] <= result["tensor_bytes"]
        assert 0 < result["gradient_error"] <= result["gradient_error_worst"] < 1e-3
        ours = implementation == "reversible"
        assert ("report" in result, "at_the_peak_fresh" in result) == (ours, ours)
        assert "resident_bytes_fresh" in result

    def test_a_single_step_tells_all(self) -> None:
        usual = memory_case.run_case(memory_case.Case("reversible", TINY, passes=2))
        single = memory_case.run_case(memory_case.Case("reversible", TINY, passes=0))
        assert 0.5 < single["tensor_bytes_fresh"] / usual["tensor_bytes_fresh"] < 2  # the anchors are not yet adapted
        assert "tensor_bytes" not in single
        assert single["report"][0]["passes"] == 1

    def test_missing_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "memcnn", None)
        assert "memcnn" in memory_case.run_case(memory_case.Case("memcnn", TINY))["missing"]

    def test_error_of_gradients(self) -> None:
        exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
        error, worst = memory_case.gradient_error([torch.tensor([3.0, 0.3]), torch.tensor([4.0])], exact)
        assert (error, worst) == (pytest.approx(0.06), pytest.approx(0.1))
        assert math.isnan(memory_case.gradient_error([torch.tensor([float("nan"), 0.0]), exact[1]], exact)[0])


def row(implementation: str, n_steps: int, size: float, **more: object) -> memory.Row:
    shape = dataclasses.replace(memory.DEPTH, n_steps=n_steps)
    return dataclasses.replace(memory.Row("depth", implementation, shape, tensor_bytes=size), **more)  # type: ignore[arg-type]


def test_plots_take_what_a_single_step_tells() -> None:
    rows = [dataclasses.asdict(row("plain", 8, 8e6)), dataclasses.asdict(row("plain", 16, 0.0))]
    rows[1] |= {"tensor_bytes": None, "tensor_bytes_fresh": 7e6}
    assert memory_plots._points(rows, "depth", "plain") == [(8, 8.0, False), (16, 7.0, False)]


class TestTable:
    def test_straight_line(self) -> None:
        known = [row("plain", 2, 120.0), row("plain", 1, 100.0)]
        assert memory.straight_line(known, 32) == {"tensor_bytes": 720.0}

    @pytest.mark.parametrize(
        ("limit", "seconds", "counted"), [(8.0, 60.0, False), (1e-4, 60.0, True), (8.0, 1.0, True)]
    )
    def test_what_is_too_large_or_long_is_counted(
        self, monkeypatch: pytest.MonkeyPatch, limit: float, seconds: float, counted: bool
    ) -> None:
        options = memory._options(["--limit", str(limit), "--seconds", str(seconds)])
        runner = memory.Runner(options)

        def case(implementation: str, shape: memory.Shape, passes: int, errors: bool) -> dict[str, float]:
            size = 1e5 * shape.n_steps
            return {"tensor_bytes": size, "tensor_bytes_fresh": size, "seconds": 0.1 * shape.n_steps}

        monkeypatch.setattr(runner, "case", case)
        rows = list(runner.rows("resolution", "plain", [dataclasses.replace(memory.RESOLUTION, n_steps=4)], probe=True))
        assert [row.shape.n_steps for row in rows] == [1, 2, 4]
        assert [row.counted for row in rows] == [False, False, counted]
        assert rows[-1].tensor_bytes == pytest.approx(4e5)

    def test_growth_is_of_what_was_measured(self) -> None:
        rows = [row("plain", 8, 800e3), row("plain", 32, 3200e3), row("plain", 512, 1.0, counted=True)]
        rows += [row("reversible", 8, 80e3), row("reversible", 32, 82e3)]
        per_step = memory.growth(rows, "tensor_bytes")
        assert per_step == {"plain": 100e3, "reversible": pytest.approx(2e3 / 24)}
        assert "within 1/100" in memory.verdicts(rows)[0]
        rows[-1].tensor_bytes = 120e3
        assert "beyond 1/100" in memory.verdicts(rows)[0]

    def test_bar_of_one_large_step(self) -> None:
        large = memory.Row("resolution", "reversible", memory.RESOLUTION, tensor_bytes=65e6, resident_bytes=100e6)
        assert [line.split(", ")[-1] for line in memory.verdicts([large])] == ["beyond 64 MB", "within 200 MB"]
        assert not memory.verdicts([dataclasses.replace(large, counted=True)])

    def test_counted_is_said(self) -> None:
        assert memory.text(row("plain", 8, 1e6, counted=True)).endswith("  counted")
        assert "counted" not in memory.text(row("plain", 8, 1e6))


def test_anchors_everywhere_are_not_reversible() -> None:
    good = memory_gradients.GradientRow("", "reversible", 1.0, 1.0, 1.0, 2.0, 1.0, 6, 32, (4,), 0.1, 1, 8)
    assert good.reversible
    assert good.within
    assert not dataclasses.replace(good, spacing=(1,)).reversible
    assert not dataclasses.replace(good, redone_steps=192).reversible
    assert not dataclasses.replace(good, ratio=float("nan")).within


@pytest.mark.full
def test_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "DEPTH", TINY)
    options = ["--only", "depth", "--depths", "1,3", "--implementations", "plain,reversible", "--passes", "1"]
    assert memory.main([*options, "--threads", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "memory-cpu.json").read_text())
    rows = {(entry["implementation"], entry["shape"]["n_steps"]): entry for entry in content["rows"]}
    assert len(rows) == 4
    assert rows["plain", 3]["tensor_bytes"] > 2 * rows["plain", 1]["tensor_bytes"]
    assert rows["reversible", 3]["report"][0]["passes"] > 0
    assert "growth per step" in capsys.readouterr().out
    drawn = memory_plots.draw(content["rows"], tmp_path, "cpu")
    assert drawn or (tmp_path / "memory-depth-cpu.png").stat().st_size > 0
