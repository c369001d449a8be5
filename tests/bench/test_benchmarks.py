"""Each benchmark runs with tiny sizes, and the tables of the pages are those of the results that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.latent_runs import write_emoji

from bench import all as every
from bench import calls, directions, harness, kernels, live, memory, models, nets, recipe, tables
from bench.harness import Row
from pyglow_fast._core import backend

compiled = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")


def smoke(module: ModuleType, *options: str) -> list[Row]:
    """Prepare a benchmark's cases in this process, which checks what they compute, and run each once."""
    threads = torch.get_num_threads()
    prepared = harness.prepare(module.__name__, ["--quick", "--threads", str(threads), *options])
    torch.set_num_threads(threads)
    assert prepared.failures == []
    for _, call in prepared.cases:
        if call is not None:
            call()
    return [row for row, _ in prepared.cases]


def test_all_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, ran = {"device": "a processor", "commit": "abc"}, []

    def run(command: Sequence[str], check: bool) -> SimpleNamespace:
        ran.append(command[2])
        return SimpleNamespace(returncode=int(command[2] == "bench.nets"))

    monkeypatch.setattr(every, "machine", lambda device: facts)
    monkeypatch.setattr(every.subprocess, "run", run)
    harness.write_json(tmp_path / "calls-cpu.json", facts, [])
    harness.write_json(tmp_path / "memory-cpu.json", facts | {"commit": "abd"}, [])
    assert every.main(["--only", "calls,nets,memory", "--out", str(tmp_path)]) == 1
    assert ran == ["bench.nets", "bench.memory"]
    assert "hours: nets ?, memory ?" in (said := capsys.readouterr().out)
    assert said.endswith("failed: nets\n")


class TestSmoke:
    def test_models(self) -> None:
        rows = smoke(models, "--configs", "d", "--workloads", "train step,sample")
        assert {"store", "reversible", "plain", "torch checkpoint"} <= {row.name for row in rows}
        assert {row.what for row in rows} == {"train step", "sample"}

    def test_models_in_bfloat16(self) -> None:
        options = ("--precision", "bf16", "--workloads", "train step", "--implementations", "store,reversible,plain")
        rows = smoke(models, "--configs", "b", *options)
        assert {(row.name, row.dtype) for row in rows} >= {("store", "bfloat16"), ("store", "float32")}

    def test_memory(self) -> None:
        names = "reversible,torch checkpoint"
        rows = smoke(memory, "--only", "depth", "--depths", "2", "--passes", "0", "--implementations", names)
        assert [row.name for row in rows] == ["reversible", "torch checkpoint"]
        assert all(0 < row.facts["fresh"] <= row.facts["held"] for row in rows)

    @pytest.mark.full
    def test_memory_budgets(self) -> None:
        rows = smoke(memory, "--budgets", "--cases", "a", "--passes", "0")
        assert {"store", "reversible", "plain", "100 %"} <= {row.name for row in rows}

    def test_nets(self) -> None:
        rows = smoke(nets, "--nets", "conv1d,linear")
        assert {row.name for row in rows} == {"ours", "library"}

    def test_calls(self) -> None:
        rows = smoke(calls)
        assert {"coupling_mix", "store", "kernels of store", "frozen"} <= {row.name for row in rows}

    @compiled
    def test_directions(self) -> None:
        rows = smoke(directions)
        assert {row.what for row in rows} == {"forward", "inverse", "log_prob", "decode"}
        assert all(row.facts["error"] < 1e-4 and row.facts["kept"] > 0 for row in rows)

    @compiled
    def test_kernels(self) -> None:
        rows = smoke(kernels, "--shapes", "2x12x8x8")
        assert {(row.case, row.name) for row in rows} >= {("2x12x8x8", kernels.OURS), ("2x12x8x8", kernels.COPY)}

    @pytest.mark.full
    def test_live(self) -> None:
        rows = smoke(live, "--models", "chaiyujin", "--precision", "fp32", "--batch", "1")
        assert {row.name for row in rows} == set(live.VARIANTS)


@pytest.mark.full
class TestCommands:
    """In processes of their own, with files."""

    def test_against_another_checkout(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        options = ["--quick", "--rounds", "2", "--against", str(harness.ROOT), "--out", str(tmp_path)]
        assert harness.run("bench.calls", options) == 0
        machine, rows = harness.read_rows(tmp_path / "calls-cpu.json")
        assert machine["threads"] == "1"
        ours, others = [row for row in rows if not row.origin], [row for row in rows if row.origin]
        assert [row.name for row in ours] == [row.name for row in others]
        assert all((row.seconds or 0) > 0 and (row.processor_seconds or 0) > 0 for row in rows)
        assert "against" in capfd.readouterr().out

    def test_a_case_that_fails_is_said(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        options = ["--quick", "--only", "depth", "--depths", "1", "--implementations", "store", "--limit", "-1"]
        assert harness.run("bench.memory", [*options, "--out", str(tmp_path)]) == 1
        assert "the process failed" in capfd.readouterr().out


@pytest.mark.full
def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its loops train and are scored; a run that is there is not done again."""
    write_emoji(tmp_path / "emoji")
    for name, value in {"STEPS": 1, "HIDDEN": 8, "BATCH": 2, "SAMPLES": 100, "PICTURE": tmp_path / "x.png"}.items():
        monkeypatch.setattr(recipe, name, value)
    options = ["--sets", "emoji", "--emoji", str(tmp_path / "emoji"), "--seeds", "0", "--out", str(tmp_path)]
    assert recipe.main([*options, "--times", "2"]) == 0
    _, rows = harness.read_rows(tmp_path / "recipe-cpu.json")
    assert [row.name for row in rows] == list(recipe.NAMES)
    assert all(0 < row.facts["bits"] < 12 and row.facts["steps"] > 0 for row in rows)
    assert (tmp_path / "x.png").is_file()
    monkeypatch.setattr(recipe, "one_run", lambda *rest: pytest.fail("trained again"))
    assert recipe.main([*options, "--times", "2"]) == 0


class TestTables:
    def test_pages_have_the_results(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert tables.main([]) == 0, capsys.readouterr().out

    def test_a_page_that_differs_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        page = tmp_path / "README.md"
        page.write_text("<!-- table glow_tts -->\n| an | old one |\n<!-- end of glow_tts -->\n", encoding="utf-8")
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        monkeypatch.setattr(tables, "PAGES", ("README.md",))
        assert tables.main([]) == 1
        assert tables.main(["--write"]) == 0
        assert tables.glow_tts() in page.read_text(encoding="utf-8")
        assert tables.main([]) == 0

    @pytest.mark.parametrize("path", sorted(harness.RESULTS.iterdir()), ids=lambda path: path.name)
    def test_every_result_is_quoted(self, path: Path) -> None:
        pages = [harness.ROOT / "README.md", *(harness.ROOT / "docs").glob("*.md")]
        assert any(path.name in page.read_text(encoding="utf-8") for page in pages)


def test_turns_and_their_summary() -> None:
    count = {"a": 0, "b": 0}

    def case(name: str) -> harness.Call:
        def run() -> None:
            count[name] += 1

        return run

    turns = harness.Turns({name: case(name) for name in count})
    assert all(turns.round(number).keys() == count.keys() for number in range(3))
    assert min(count.values()) > 3  # once to see how long it takes, and in each round
    row = Row("case", "what", "a", per=2).timed([(4.0, 2.0), (2.0, 8.0), (6.0, 4.0)])
    assert (row.seconds, row.seconds_low, row.seconds_high, row.processor_seconds) == (2.0, 1.5, 2.5, 2.0)
