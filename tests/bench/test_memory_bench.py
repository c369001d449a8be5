"""The memory benchmark counts what it says, compares the same function, and does not pass what it has not measured."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    harness,
    memory,
    memory_case,
    memory_gradients,
    memory_models,
    memory_plots,
    memory_rows,
    memory_runner,
)
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

    def test_allocator_without_what_an_earlier_trace_saw(self) -> None:
        with AllocatorTrace():
            old = kb(7)
        with AllocatorTrace() as trace:
            del old
            kept = kb(10)
        assert trace.peak_without() == 10 * KB
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


def _kept(model: torch.nn.Module, shape: memory_models.Shape) -> int:
    """Bytes alive between forward and backward."""
    x = memory_models.images(shape, CPU)
    gc.collect()
    with MemoryMeter() as meter:
        loss = model.log_prob(x).mean()  # type: ignore[operator]
        kept = meter.now
    loss.backward()
    return kept


class TestModels:
    @pytest.mark.parametrize("implementation", [*memory_models.IMPLEMENTATIONS, *memory_models.PARTLY])
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

    @pytest.mark.parametrize(
        ("implementation", "wrapped"),
        [
            ("plain", []),
            ("memcnn", []),
            ("torch checkpoint 1/4", [3, 7]),
            ("torch checkpoint 1/2", [1, 3, 5, 7]),
            ("torch checkpoint 3/4", [1, 2, 3, 5, 6, 7]),
            ("torch checkpoint", [*range(8)]),
        ],
    )
    def test_a_share_of_the_steps(self, implementation: str, wrapped: list[int]) -> None:
        assert [k for k in range(8) if memory_models.is_checkpointed(implementation, k)] == wrapped

    def test_more_checkpointed_steps_keep_less(self) -> None:
        shape = dataclasses.replace(TINY, n_steps=4, hidden=32)
        names = ("plain", *memory_models.PARTLY, "torch checkpoint")
        kept = [_kept(memory_models.build(name, shape, "auto", CPU), shape) for name in names]
        # Each quarter is one step of either level: the outputs of its net's two hidden convolutions, at least.
        hidden = sum(2 * 2 * 32 * side * side * 4 for side in (8, 4))
        assert all(more - less >= hidden for more, less in itertools.pairwise(kept))

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
        result = memory_case.run_case(
            memory_case.Case(implementation, TINY, passes=2, errors=True, parts=implementation != "plain")
        )
        # A state of each of the first level's steps, at least, is alive in either.
        assert result["tensor_bytes"] > 4 * 2 * 12 * 64
        assert 0 < result["tensor_bytes_fresh"] <= result["tensor_bytes"]
        assert 0 < result["gradient_error"] <= result["gradient_error_worst"] < 1e-3
        ours = implementation == "reversible"
        assert ("report" in result, "at_the_peak_fresh" in result) == (ours, ours)
        assert "resident_bytes_fresh" in result

    def test_the_fewest_steps(self) -> None:
        usual = memory_case.run_case(memory_case.Case("reversible", TINY, passes=2))
        few = memory_case.run_case(memory_case.Case("reversible", TINY, passes=0))
        # Anchors of two steps do not move within so few passes, so that the second step keeps what the third one does.
        assert few["tensor_bytes"] == usual["tensor_bytes"]
        assert few["tensor_bytes_fresh"] == usual["tensor_bytes_fresh"]
        assert "resident_bytes" not in few
        assert few["report"][0]["passes"] == 3  # one before, one with gradients held, one with fresh ones

    def test_bytes_that_a_model_refuses(self) -> None:
        refused = memory_case.run_case(memory_case.Case("store", TINY, memory=1))["refused"]
        assert refused.startswith("memory: expected")

    def test_bytes_are_given_before_the_first_step(self) -> None:
        most = memory_case.run_case(memory_case.Case("store", TINY, passes=0))
        given = memory_case.run_case(memory_case.Case("store", TINY, passes=0, memory=2 * most["tensor_bytes"]))
        budget = 9 * most["tensor_bytes"] // 10
        less = memory_case.run_case(memory_case.Case("store", TINY, passes=0, memory=budget))
        assert given["tensor_bytes"] == most["tensor_bytes"]
        assert less["tensor_bytes"] <= budget

    def test_missing_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "memcnn", None)
        assert "memcnn" in memory_case.run_case(memory_case.Case("memcnn", TINY))["missing"]

    def test_error_of_gradients(self) -> None:
        exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
        error, worst = memory_case.gradient_error([torch.tensor([3.0, 0.3]), torch.tensor([4.0])], exact)
        assert (error, worst) == (pytest.approx(0.06), pytest.approx(0.1))
        assert math.isnan(memory_case.gradient_error([torch.tensor([float("nan"), 0.0]), exact[1]], exact)[0])


def row(implementation: str, n_steps: int, size: float, **more: object) -> memory_rows.Row:
    shape = dataclasses.replace(memory_rows.DEPTH, n_steps=n_steps)
    return dataclasses.replace(memory_rows.Row("depth", implementation, shape, tensor_bytes=size), **more)  # type: ignore[arg-type]


def test_plots_take_what_a_single_step_tells() -> None:
    rows = [dataclasses.asdict(row("plain", 8, 8e6)), dataclasses.asdict(row("plain", 16, 0.0))]
    rows[1] |= {"tensor_bytes": None, "tensor_bytes_fresh": 7e6}
    assert memory_plots._points(rows, "depth", "plain") == [(8, 8.0, False), (16, 7.0, False)]


class TestTable:
    def test_straight_line(self) -> None:
        known = [row("plain", 2, 120.0), row("plain", 1, 100.0)]
        assert memory_rows.straight_line(known, 32) == {"tensor_bytes": 720.0}

    @pytest.mark.parametrize(
        ("limit", "seconds", "counted"), [(8.0, 60.0, False), (1e-4, 60.0, True), (8.0, 1.0, True)]
    )
    def test_what_is_too_large_or_long_is_counted(
        self, monkeypatch: pytest.MonkeyPatch, limit: float, seconds: float, counted: bool
    ) -> None:
        options = memory._options(["--limit", str(limit), "--seconds", str(seconds)])
        runner = memory_runner.Runner(options)

        def case(implementation: str, shape: memory_models.Shape, passes: int, errors: bool) -> dict[str, float]:
            size = 1e5 * shape.n_steps
            return {"tensor_bytes": size, "tensor_bytes_fresh": size, "seconds": 0.1 * shape.n_steps}

        monkeypatch.setattr(runner, "case", case)
        rows = list(
            runner.rows("resolution", "plain", [dataclasses.replace(memory_rows.RESOLUTION, n_steps=4)], probe=True)
        )
        assert [row.shape.n_steps for row in rows] == [1, 2, 4]
        assert [row.counted for row in rows] == [False, False, counted]
        assert rows[-1].tensor_bytes == pytest.approx(4e5)

    @pytest.mark.parametrize(
        ("implementation", "shape", "passes"),
        [
            ("reversible", memory_rows.HUGE, 0),
            ("checkpoint", memory_rows.HUGE, 0),
            ("reversible", memory_rows.RESOLUTION, 3 + memory_runner.ADAPTING),
            (memory_rows.SMALL_NETS, memory_rows.DEPTH, 3 + memory_runner.ADAPTING),
            ("memcnn", memory_rows.RESOLUTION, 1),
            ("memcnn", memory_rows.DEPTH, 3),
        ],
    )
    def test_steps_before_bytes_are_counted(
        self, monkeypatch: pytest.MonkeyPatch, implementation: str, shape: memory_models.Shape, passes: int
    ) -> None:
        runner, asked = memory_runner.Runner(memory._options([])), []
        result = {"tensor_bytes": 1.0, "tensor_bytes_fresh": 1.0}
        monkeypatch.setattr(runner, "case", lambda name, shape, passes, errors: asked.append(passes) or result)
        assert len(list(runner.rows("resolution", implementation, [shape], probe=False))) == 1
        assert asked == [passes]

    @pytest.mark.parametrize(("only", "expected"), [("depth", False), ("depth,gradients", True)])
    def test_errors_are_of_the_part_gradients(self, monkeypatch: pytest.MonkeyPatch, only: str, expected: bool) -> None:
        runner, asked = memory_runner.Runner(memory._options(["--only", only])), []
        monkeypatch.setattr(runner, "case", lambda name, shape, passes, errors: asked.append(errors))
        list(runner.rows("depth", "plain", [memory_rows.DEPTH], probe=False))
        assert asked == [expected]

    def test_small_nets_are_reversible_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runner = memory_runner.Runner(memory._options(["--small-nets", "12345"]))
        asked = []
        monkeypatch.setattr(runner, "process", lambda module, text, name: asked.append(memory_case.Case.of(text)))
        runner.case(memory_rows.SMALL_NETS, TINY, 1, errors=False)
        runner.case("reversible", TINY, 1, errors=False)
        assert [(case.implementation, case.budget) for case in asked] == [("reversible", 12345), ("reversible", "auto")]

    def test_growth_is_of_what_was_measured(self) -> None:
        rows = [row("plain", 8, 800e3), row("plain", 32, 3200e3), row("plain", 512, 1.0, counted=True)]
        rows += [row("reversible", 8, 80e3), row("reversible", 32, 82e3)]
        per_step = memory_rows.growth(rows, "tensor_bytes")
        assert per_step == {"plain": 100e3, "reversible": pytest.approx(2e3 / 24)}
        assert "within 1/100" in memory_rows.verdicts(rows)[0]
        rows[-1].tensor_bytes = 120e3
        assert "beyond 1/100" in memory_rows.verdicts(rows)[0]

    @pytest.mark.parametrize(("image", "bar"), [(memory_rows.RESOLUTION, "40"), (memory_rows.HUGE, "380")])
    def test_bar_of_one_large_step(self, image: memory_models.Shape, bar: str) -> None:
        large = memory_rows.Row(
            "resolution", "reversible", image, tensor_bytes=1e6 * int(bar) + 1e5, tensor_bytes_fresh=1e6 * int(bar)
        )
        assert [line.split(", ")[-1] for line in memory_rows.verdicts([large])] == [
            f"beyond {bar} MB",
            f"within {bar} MB",
        ]
        assert not memory_rows.verdicts([dataclasses.replace(large, counted=True)])

    @pytest.mark.parametrize(("size", "verdict"), [(20e6, "within"), (20.1e6, "beyond")])
    def test_bar_of_the_deepest(self, size: float, verdict: str) -> None:
        (line,) = memory_rows.verdicts([row("reversible", 512, size)])
        assert line.endswith(f", {verdict} 20 MB")

    @pytest.mark.parametrize(("per_step", "verdict"), [(30e3, "within"), (30.1e3, "beyond")])
    def test_bar_of_the_growth(self, per_step: float, verdict: str) -> None:
        rows = [row("reversible", 8, 1e6), row("reversible", 128, 2e6), row("reversible", 512, 2e6 + 384 * per_step)]
        assert f"{per_step / 1e3:.1f} kB, {verdict} 30 kB" in memory_rows.verdicts(rows)[0]
        assert not any("kB" in line for line in memory_rows.verdicts(rows[:2]))  # other depths, another growth

    def test_never_above_what_wraps_steps(self) -> None:
        rows = [row("memcnn", 8, 12e6), row("reversible", 8, 13e6), row("reversible", 32, 1e6), row("plain", 8, 1e6)]
        (line,) = memory_rows.verdicts(rows)
        assert "13.0 MB, above memcnn's 12.0 MB" in line
        rows.append(row(memory_rows.SMALL_NETS, 8, 12e6))
        (line,) = memory_rows.verdicts(rows)
        assert f"{memory_rows.SMALL_NETS} 12.0 MB, not above memcnn's" in line
        rows[-1].counted = True
        assert "above" in memory_rows.verdicts(rows)[0]
        assert "not above" not in memory_rows.verdicts(rows)[0]

    def test_rows_of_an_earlier_run(self) -> None:
        machine = {"device": "another", "threads": "2", "torch": "2.0", "commit": "abc"}
        old = [row("FrEIA", 8, 1e6), row("FrEIA", 32, 1e6), row("store", 32, 1e6), row("plain", 32, 1e6)]
        content = json.loads(json.dumps({"machine": machine, "rows": [dataclasses.asdict(found) for found in old]}))
        here = [row("FrEIA", 8, 2e6), row("FrEIA", 32, 2e6, counted=True)]
        (taken,) = memory_rows.earlier(content, here, "abd")
        assert (taken.implementation, taken.shape, taken.tensor_bytes) == ("FrEIA", old[1].shape, 1e6)
        assert memory_rows.text(taken).endswith("  of another, 2 threads, torch 2.0, abc")
        again = json.loads(
            json.dumps({"machine": machine | {"device": "a third"}, "rows": [dataclasses.asdict(taken)]})
        )
        assert memory_rows.earlier(again, [], "abd")[0].origin == taken.origin  # the first one's

    @pytest.mark.parametrize(
        ("then", "now", "taken"),
        [("abc", "abc", True), ("abc", "abd", False), ("abc-dirty", "abc-dirty", False), ("unknown", "unknown", False)],
    )
    def test_ours_of_the_same_build(self, then: str, now: str, taken: bool) -> None:
        machine = {"device": "this", "threads": "2", "torch": "2.0", "commit": then}
        old = [row(name, 8, 1e6) for name in ("store", memory_rows.SMALL_NETS, "plain", "memcnn")]
        content = {"machine": machine, "rows": [dataclasses.asdict(found) for found in old]}
        assert len(memory_rows.earlier(content, [], now)) == len(old) * taken
        assert not memory_rows.earlier(content, old, now)

    def test_counted_is_said(self) -> None:
        assert memory_rows.text(row("plain", 8, 1e6, counted=True)).endswith("  counted")
        assert "counted" not in memory_rows.text(row("plain", 8, 1e6))


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
    for module in (memory, harness):
        monkeypatch.setattr(module, "commit", lambda: "abc")
    options = ["--only", "depth", "--depths", "1,3", "--implementations", "plain,reversible", "--passes", "1"]
    assert memory.main([*options, "--threads", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "memory-cpu.json").read_text())
    rows = {(entry["implementation"], entry["shape"]["n_steps"]): entry for entry in content["rows"]}
    assert len(rows) == 4
    assert rows["plain", 3]["tensor_bytes"] > 2 * rows["plain", 1]["tensor_bytes"]
    assert rows["reversible", 3]["report"][0]["passes"] > 0
    assert "growth per step" in capsys.readouterr().out
    again = [*options[:2], "--depths", "1", "--implementations", "reversible", "--passes", "1", "--threads", "2"]
    others = ["--others", str(tmp_path / "memory-cpu.json"), "--out", str(tmp_path / "again")]
    assert memory.main([*again, *others]) == 0
    found = json.loads((tmp_path / "again" / "memory-cpu.json").read_text())
    assert found["machine"]["threads"] == "2"  # of the cases, not of this process
    origins = {(entry["implementation"], entry["shape"]["n_steps"]): bool(entry["origin"]) for entry in found["rows"]}
    taken = {("reversible", 3): True, ("plain", 1): True, ("plain", 3): True}
    assert origins == {("reversible", 1): False} | taken
    drawn = memory_plots.draw(content["rows"], tmp_path, "cpu")
    assert drawn or (tmp_path / "memory-depth-cpu.png").stat().st_size > 0


class TestLarge:
    def run(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
        """The rows of cases that are answered, not measured; some are written after each curve."""
        lengths: list[int] = []
        right = memory.write_json

        def case(
            runner: memory_runner.Runner, name: str, shape: memory_models.Shape, *rest: object, **more: object
        ) -> dict[str, float]:
            return {"tensor_bytes": 1e6 * shape.n_steps, "tensor_bytes_fresh": 1.0, "seconds": 1.0}

        def write(path: Path, facts: dict[str, str], rows: list[memory_rows.Row], **more: Any) -> None:
            lengths.append(len(rows))
            right(path, facts, rows, **more)

        monkeypatch.setattr(memory_runner.Runner, "case", case)
        monkeypatch.setattr(memory, "write_json", write)
        given = ["--only", "large", "--implementations", "store,plain", "--out", str(folder), *options]
        assert memory.main(given) == 0
        rows: list[dict[str, Any]] = json.loads((folder / "memory-cpu.json").read_text())["rows"]
        assert lengths == [2, 4, 6, 8, 8]
        return rows

    def test_depths_at_256_and_1024_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = self.run(tmp_path, monkeypatch)
        assert [(row["curve"], row["implementation"], row["shape"]["n_steps"]) for row in rows] == [
            (f"depth at {side}", name, k) for side in (256, 1024) for name in ("store", "plain") for k in (4, 16)
        ]
        assert {(*row["shape"]["image"], row["shape"]["n_levels"]) for row in rows} == {
            (3, 256, 256, 4),
            (3, 1024, 1024, 6),
        }
        assert {row["shape"]["hidden"] for row in rows} == {512}

    def test_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = self.run(tmp_path, monkeypatch, "--sizes", "32,64", "--depths", "3,1", "--quick")
        assert [row["shape"]["n_steps"] for row in rows[:2]] == [1, 3]
        assert {row["shape"]["image"][1] for row in rows} == {32, 64}
        assert {row["shape"]["hidden"] for row in rows} == {16}
