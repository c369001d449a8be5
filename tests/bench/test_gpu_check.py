"""The GPU check on any machine: stages run, fail, run out of time and are reported; without a GPU it says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import gpu_check


def test_a_stage_reports_how_it_ended() -> None:
    passed = gpu_check.run("a", [sys.executable, "-c", "print('fine')"], 60)
    assert (passed.status, passed.tail) == ("passed", "fine\n")
    failed = gpu_check.run("b", [sys.executable, "-c", "import sys; sys.exit('broken')"], 60)
    assert (failed.status, failed.reason, failed.tail) == ("failed", "exit code 1", "broken\n")
    assert gpu_check.run("c", ["/nowhere/at/all"], 60).status == "failed"


def test_a_stage_and_its_children_end_in_time() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stage = gpu_check.run("slow", [sys.executable, "-c", program], 1)
    assert stage.status == "timeout"
    assert stage.seconds < 30


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The build is what `make test` has done; here it is one that passes at once."""

    def build(check: gpu_check.Check) -> gpu_check.Stage:
        return check.go("build", [sys.executable, "-c", "pass"], 60)

    monkeypatch.setattr(gpu_check.Check, "build", build)


def test_without_a_gpu(tmp_path: Path, no_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "check.json"
    assert gpu_check.main(["--out", str(out), "--minutes", "2"]) == 2
    content = json.loads(out.read_text())
    stages = [(stage["name"].split(",")[0], stage["status"]) for stage in content["stages"]]
    assert stages == [("machine", "passed"), ("build", "passed"), ("tests", "skipped")]
    assert content["stages"][-1]["reason"] == gpu_check.NO_GPU
    assert content["machine"]["torch"]


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_all_stages_in_order(
    good: bool, code: int, tmp_path: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU that is only said to be there and stages that do nothing: order, results and exit code."""

    def machine(check: gpu_check.Check) -> bool:
        check.facts |= {"capability": "9.0", "device": "none"}
        return True

    def go(
        check: gpu_check.Check, name: str, command: list[str], budget: float, environment: dict[str, str] | None = None
    ) -> gpu_check.Stage:
        if name == "kernels":
            (check.scratch / "kernels-cuda.json").write_text('{"rows": [1]}')
        return check.add(gpu_check.Stage(name, "passed" if good or name != "tests" else "failed"))

    monkeypatch.setattr(gpu_check.Check, "machine", machine)
    monkeypatch.setattr(gpu_check.Check, "go", go)
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: f"/bin/{name}")
    out = tmp_path / "check.json"
    assert gpu_check.main(["--out", str(out)]) == code
    stages = {stage["name"]: stage for stage in json.loads(out.read_text())["stages"]}
    names = ["build", "tests", "sanitize memcheck", "sanitize racecheck", "kernels", "op_memory", "models", "memory"]
    assert list(stages) == names
    assert stages["kernels"]["results"] == {"rows": [1]}


def test_no_time_is_not_a_success(tmp_path: Path, no_build: None) -> None:
    check = gpu_check.Check(tmp_path / "check.json", 0.0)
    stage = check.go("late", [sys.executable, "-c", "pass"], 60)
    assert (stage.status, stage.reason) == ("skipped", "no time is left")
