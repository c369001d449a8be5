"""The benchmark of time against bytes gives the budgets it says, and judges peaks and times by its bars."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import memory, memory_budgets, memory_plots, memory_runner
from bench.memory_budgets import BudgetRow, Turns
from bench.memory_models import PARTLY, Shape
from bench.model_cases import CONFIGS
from bench.model_checks import Unequal

TINY = Shape((3, 16, 16), 2, 2, 8, 2)
MODES = ("store", "checkpoint", "reversible")
PEERS = ("plain", *PARTLY, "torch checkpoint")


def options(*more: str) -> Any:
    return memory._options(["--budgets", *more])


def row(variant: str, peak: float, budget: float | None = None, **seconds: float) -> BudgetRow:
    """Bytes in MB; seconds by setting of malloc."""
    size = None if budget is None else int(budget * 1e6)
    times = {malloc: (value, value, value) for malloc, value in seconds.items()}
    return BudgetRow("a", variant, TINY, size, int(peak * 1e6), 0, seconds=times)


class TestOptions:
    def test_cases(self) -> None:
        assert options("--cases", "a,e").cases == ["a", "e"]
        assert options().cases is None

    @pytest.mark.parametrize("cases", ["d", "a,x", ""])
    def test_unknown_cases(self, cases: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            options("--cases", cases)
        assert "expected some of a, b, c, e" in capsys.readouterr().err

    @pytest.mark.parametrize("case", memory_budgets.CASES)
    def test_shapes(self, case: str) -> None:
        assert memory_budgets.case_shape(case, quick=False) == CONFIGS[case]
        assert memory_budgets.case_shape(case, quick=True).hidden < CONFIGS[case].hidden

    def test_text_of_turns(self) -> None:
        turns = Turns(TINY, {"store": "store", "50 %": 12345}, "auto", 3, 1.0, "cpu", 1)
        assert Turns.of(turns.text()) == turns


@pytest.mark.parametrize(("percent", "expected"), [(0, 100), (25, 325), (50, 550), (75, 775), (100, 1000)])
def test_bytes_on_the_way(percent: int, expected: int) -> None:
    assert memory_budgets.budget_bytes(100, 1000, percent) == expected


def test_a_peak_is_the_larger_one() -> None:
    held = BudgetRow("a", "store", TINY, tensor_bytes=2, tensor_bytes_fresh=1)
    assert held.peak == dataclasses.replace(held, tensor_bytes=1, tensor_bytes_fresh=2).peak == 2


class TestVerdicts:
    @pytest.mark.parametrize(
        ("peak", "verdict"), [(100.0, "within"), (85.0, "within"), (100.1, "beyond"), (84.9, "beyond")]
    )
    def test_peaks(self, peak: float, verdict: str) -> None:
        lines = memory_budgets.verdicts([row("25 %", peak, 100.0)])
        assert lines[0] == f"(a) 25 %: peak {peak:.1f} MB of 100.0 MB, {peak:.1f} %, {verdict} 85 .. 100 %"

    def test_all_bytes_need_not_be_used(self) -> None:
        lines = memory_budgets.verdicts([row("100 %", 84.0, 100.0)])
        assert lines[-1].endswith("within 0 .. 100 %")
        assert memory_budgets.verdicts([row("100 %", 100.1, 100.0)])[-1].endswith("beyond 0 .. 100 %")

    # From 2 s of reversible to 1 s of store: on the line 1.75, 1.5, 1.25 and 1.
    @pytest.mark.parametrize(("percent", "on_the_line"), [(25, 1.75), (50, 1.5), (75, 1.25), (100, 1.0)])
    @pytest.mark.parametrize(("times", "verdict"), [(0.9, "within"), (1.0299, "within"), (1.0301, "beyond")])
    def test_times(self, percent: int, on_the_line: float, times: float, verdict: str) -> None:
        rows = [row("reversible", 10, tuned=2.0), row("store", 100, tuned=1.0)]
        rows.append(row(f"{percent} %", 90, 100, tuned=times * on_the_line))
        (line,) = [line for line in memory_budgets.verdicts(rows) if "malloc" in line]
        assert f"{times:.3f} of" in line
        assert line.endswith(f"{verdict} 1.03")

    def test_each_setting_has_its_own_line(self) -> None:
        rows = [row("reversible", 10, default=4.0, tuned=2.0), row("store", 100, default=4.0, tuned=1.0)]
        rows.append(row("50 %", 55, 55, default=4.0, tuned=1.6))
        lines = [line for line in memory_budgets.verdicts(rows) if "malloc" in line]
        assert [line.split(", ")[-1] for line in lines] == ["within 1.03", "beyond 1.03"]

    def test_what_is_not_measured_is_said(self) -> None:
        rows = [row("reversible", 10, tuned=2.0), row("store", 100, tuned=1.0), row("50 %", 55, 55)]
        lines = memory_budgets.verdicts(rows)
        assert [line for line in lines if line.endswith("not measured")] == [
            f"(a) {percent} %: not measured" for percent in (25, 75, 100)
        ]
        assert not any("malloc" in line for line in lines)


class TestRows:
    def test_budgets_lie_between_the_measured_peaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = memory_runner.Runner(options("--quick", "--passes", "1"))
        asked: list[tuple[str, int, int | None]] = []

        def case(name: str, shape: Shape, passes: int, errors: bool, memory: int | None = None) -> dict[str, int]:
            asked.append((name, passes, memory))
            size = {"store": 900, "reversible": 80}.get(name, 300) if memory is None else memory - 7
            return {"tensor_bytes": size, "tensor_bytes_fresh": 100 if name == "reversible" else 0}

        monkeypatch.setattr(runner, "case", case)
        rows = memory_budgets._rows(runner, "a")
        assert [found.variant for found in rows] == [*MODES, "25 %", "50 %", "75 %", "100 %", *PEERS]
        assert [(found.budget, found.peak) for found in rows[3:7]] == [
            (300, 293),
            (500, 493),
            (700, 693),
            (900, 893),
        ]
        # What recomputes lets its anchors move first.
        adapting = 1 + memory_runner.ADAPTING
        given = [("store", adapting, memory) for memory in (300, 500, 700, 900)]
        modes = [("store", 1, None), ("checkpoint", adapting, None), ("reversible", adapting, None)]
        assert asked == [*modes, *given, *[(name, 1, None) for name in PEERS]]

    def test_what_is_refused_has_no_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = memory_runner.Runner(options("--quick"))

        def case(name: str, *_: object, memory: int | None = None, **__: object) -> dict[str, int] | None:
            return {"tensor_bytes": 500 if name == "store" else 100} if memory is None or memory > 250 else None

        monkeypatch.setattr(runner, "case", case)
        found = {found.variant for found in memory_budgets._rows(runner, "a")}
        assert "25 %" not in found
        assert "50 %" in found


class TestTurns:
    def test_all_take_turns(self) -> None:
        variants: dict[str, str | int] = {name: name for name in (*MODES, *PEERS)}
        found = memory_budgets.take(Turns(TINY, variants, "auto", 2, 60.0, "cpu", 1))
        assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(variants, 2)
        assert min(min(seconds) for seconds in found.values()) > 0

    def test_bytes_are_given_to_a_model_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        variants: dict[str, str | int] = {"75 %": 10**9, "100 %": 2 * 10**9, "store": "store", "plain": "plain"}
        models: dict[int, object] = {}
        step = memory_budgets.training_step

        def seen(model: torch.nn.Module, x: torch.Tensor) -> Any:
            models[id(model)] = getattr(model, "memory", None)
            return step(model, x)

        monkeypatch.setattr(memory_budgets, "training_step", seen)
        memory_budgets.take(Turns(TINY, variants, "auto", 2, 60.0, "cpu", 1))
        assert list(models.values()) == [10**9, 2 * 10**9, "store", None]

    def test_another_function_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step = memory_budgets.training_step

        def louder(model: torch.nn.Module, x: torch.Tensor) -> Any:
            return step(model, x if getattr(model, "memory", "") == "" else 1.01 * x)

        monkeypatch.setattr(memory_budgets, "training_step", louder)
        with pytest.raises(Unequal, match="store: gradients off by"):
            memory_budgets.take(Turns(TINY, {"plain": "plain", "store": "store"}, "auto", 2, 60.0, "cpu", 1))


def test_the_picture(tmp_path: Path) -> None:
    rows = [row("reversible", 10, default=3.0), row("store", 100, default=1.0), row("50 %", 50, 55, default=1.9)]
    rows += [row("plain", 120, default=2.0), row("torch checkpoint", 20, default=3.0), row("checkpoint", 30)]
    path = tmp_path / "budgets.png"
    note = memory_plots.draw_budgets([dataclasses.asdict(found) for found in rows], path)
    assert note == f"wrote {path}" or "matplotlib" in note
    assert path.is_file() == note.startswith("wrote")
    assert memory_plots.draw_budgets([], path).startswith("no plot")


@pytest.mark.full
def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory_budgets, "case_shape", lambda case, quick: dataclasses.replace(TINY, n_steps=4))
    more = [
        "--quick",
        "--rounds",
        "2",
        "--passes",
        "1",
        "--threads",
        "1",
        "--malloc",
        "default",
        "--out",
        str(tmp_path),
    ]
    assert memory.main(["--budgets", *more]) == 0
    content = json.loads((tmp_path / "memory-budgets-cpu.json").read_text())
    assert content["machine"]["threads"] == "1"
    rows = {entry["variant"]: entry for entry in content["rows"]}
    assert {*MODES, *PEERS} <= set(rows)
    assert all(list(entry["seconds"]) == ["default"] and entry["tensor_bytes"] > 0 for entry in rows.values())
    kept = [rows[name]["tensor_bytes"] for name in PEERS]
    assert kept == sorted(kept, reverse=True)
    # A number of bytes is either taken, with a verdict, or refused, with the reason.
    out = capsys.readouterr().out
    for percent in memory_budgets.PERCENTS:
        assert (f"(a) {percent} %: peak" in out) == (f"{percent} %" in rows)
        assert (f"(a) {percent} %: not measured" in out) == (f"{percent} %" not in rows)
    assert out.count("refused: memory:") == sum(f"{percent} %" not in rows for percent in memory_budgets.PERCENTS)
