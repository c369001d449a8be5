"""The report of a GPU check: what it says of stages that failed, tests, models against plain torch, and memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_report
from bench.memory_models import Shape
from bench.memory_rows import Row
from bench.model_cases import CHANNELS_LAST, COMPILED, CONFIGS, EAGER, PLAIN, TRAIN
from bench.model_rows import ModelRow


def content(name: str, results: Any, status: str = "passed", **more: Any) -> dict[str, Any]:
    plain = {"machine": {"device": "a GPU"}, "name": name, "status": status, "seconds": 2.0, "command": ""}
    return plain | {"reason": "", "tail": "", "code": 0, "results": results} | more


def of(*contents: dict[str, Any]) -> list[str]:
    return gpu_report.report_of({found["name"]: found for found in contents}).splitlines()


def model_row(implementation: str, variant: str, milliseconds: float, dtype: str = "tf32") -> dict[str, Any]:
    seconds = milliseconds / 1e3
    row = ModelRow(
        *("a", TRAIN, implementation, variant, "default", "a GPU", dtype, CONFIGS["a"], seconds, seconds, seconds, 5),
        *(10**9, 1 / seconds, 100.0, 0.25),
        gradient_error=2e-4,
    )
    return dataclasses.asdict(row)


def test_models_stand_against_plain_eager_and_compiled() -> None:
    eager = [model_row("store", EAGER, 10), model_row(PLAIN, EAGER, 30), model_row(PLAIN, CHANNELS_LAST, 25)]
    half = [model_row("store", EAGER, 5, "bfloat16")]
    lines = of(
        content("models", {"rows": eager, "notes": ["normflows is left out"]}),
        content("compiled", {"rows": [model_row(PLAIN, COMPILED, 15)], "notes": []}),
        content("models_bf16", {"rows": half, "notes": []}),
    )
    model = "| (a) 3x32x32 L=3 K=8 hidden 512 batch 16 "
    rows = [line for line in lines if line.startswith(model)]
    assert rows == [
        f"{model}| tf32 | store | eager | 10.00 | 2.50 | 1.50 | 0.25 | 2.0e-04 |  |",
        f"{model}| tf32 | plain | torch.compile | 15.00 | - | - | 0.25 | 2.0e-04 |  |",
        f"{model}| tf32 | plain | channels_last | 25.00 | - | - | 0.25 | 2.0e-04 |  |",
        f"{model}| tf32 | plain | eager | 30.00 | - | - | 0.25 | 2.0e-04 |  |",
        f"{model}| bfloat16 | store | eager | 5.00 | - | - | 0.25 | 2.0e-04 |  |",
    ]
    assert "- normflows is left out" in lines


def test_what_an_earlier_run_has_left_is_told_of() -> None:
    """After a run of some stages alone, at another commit."""
    machines = [{"commit": commit, "device": "a GPU"} for commit in ("new", "old")]
    lines = of(content("machine", None, machine=machines[0]), content("smoke", None, machine=machines[1]))
    assert lines[2:6] == ["- commit: new", "- device: a GPU", "- of an earlier run is smoke: commit old", ""]


def test_tests_are_counted_and_failures_named() -> None:
    results = [{"test": "a::x", "outcome": "failed", "reason": "E  line\nassert 1 | 2"}]
    results += 3 * [{"test": "b::y", "outcome": "passed", "reason": ""}]
    results += 2 * [{"test": "c.py", "outcome": "skipped", "reason": "zuko is not installed"}]
    lines = of(content("tests", results))
    assert "3 passed, 1 failed, 2 skipped." in lines
    assert "| a::x | assert 1 / 2 |" in lines
    assert "| zuko is not installed | 2 |" in lines


def test_a_stage_that_failed_says_why() -> None:
    failed = content("kernels", None, "failed", reason="exit code 1", tail="one\n\nno kernel image is available\n")
    sanitizer = content("memcheck", None, tail="========= ERROR SUMMARY: 0 errors\n")
    lines = of(failed, sanitizer)
    assert "| kernels | failed | 2 | exit code 1 | no kernel image is available |" in lines
    assert "| memcheck | passed | 2 |  | ERROR SUMMARY: 0 errors |" in lines
    assert "- device: a GPU" in lines
    assert not any("rehearsal" in line for line in lines)


def test_first_facts_name_what_failed() -> None:
    rows = [{"check": "coupling forward", "passed": True, "text": "fine"}]
    rows += [{"check": "channel_mix forward", "passed": False, "text": "off by 1"}]
    rows += [{"check": "training step, store", "passed": True, "text": "gradients off by 1e-7"}]
    lines = of(content("smoke", {"rows": rows}))
    assert "2 of 3 checks passed." in lines
    assert "| channel_mix forward | False | off by 1 |" in lines
    assert "| training step, store | True | gradients off by 1e-7 |" in lines
    assert not any("coupling forward" in line for line in lines)


def test_memory_against_depth() -> None:
    rows = [
        Row("depth at 256", name, Shape((3, side, side), 4, k, 512, 1), counted, 1e6 * k, 5e5, seconds=0.002)
        for side, k, name, counted in ((1024, 4, "plain", True), (256, 16, "store", False), (256, 4, "store", False))
    ]
    lines = of(content("memory", {"rows": [dataclasses.asdict(row) for row in rows], "notes": ["too large"]}))
    assert [line for line in lines if line.startswith(("| 256", "| 1024"))] == [
        "| 256 | 4 | 4 | 512 | store | 4.0 | 0.5 | 2.0 | measured |",
        "| 256 | 16 | 4 | 512 | store | 16.0 | 0.5 | 2.0 | measured |",
        "| 1024 | 4 | 4 | 512 | plain | 4.0 | 0.5 | 2.0 | counted |",
    ]
    assert "- too large" in lines


def test_the_command_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tests.json").write_text(json.dumps(content("tests", [])))
    (tmp_path / "machine.json").write_text(json.dumps(content("machine", None)))
    assert gpu_report.main([str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "passed" in line]
    assert [line.split()[1] for line in lines] == ["machine", "tests"]
