"""The GPU check where there is no GPU: numbers that nobody would see to be wrong, and one rehearsal of everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from bench import gpu_check, gpu_kernels, gpu_smoke, gpu_stages, gpu_steps
from bench.gpu_stages import MACHINE_SECONDS, STAGES, TOTAL_SECONDS, Stage
from pyglow_fast import _backend

CPU = torch.device("cpu")
# What the package can do without, and what pytest would load by itself.
HIDDEN = [
    *("normflows", "nflows", "FrEIA", "zuko", "memcnn", "matplotlib", "PIL", "torchvision", "sklearn", "scipy", "tqdm"),
    *("rich", "lightning", "pytorch_lightning", "tensorboard", "yaml", "tomli_w", "hypothesis", "mkdocs"),
    *("mkdocstrings", "pymdownx", "xdist", "execnet", "pytest_benchmark", "onnx", "jet_pytorch", "anomalib", "TTS"),
    "pandas",
]
# Python imports a module of this name as it starts. What is hidden is not found, as where it is not installed.
SITECUSTOMIZE = f"""
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {HIDDEN!r}
        return None if hidden else self._finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def bare_environment(folder: Path) -> dict[str, str]:
    """The environment of a Python, and of those that it starts, that has torch, numpy, safetensors and pytest alone.

    ``folder`` takes a file for it.
    """
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return known | {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class ClockOfLaunches(gpu_kernels.RotatingTimer):
    """A timer of a device on which a launch takes 3 us."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.l2_bytes, self.replay_seconds, self.launches = 50_000_000, 2e-3, 0

    def _seconds(self, replay: Callable[[], object]) -> float:
        before = self.launches
        replay()
        return 3e-6 * (self.launches - before)

    def launch(self) -> None:
        self.launches += 1


@pytest.mark.parametrize("touched", [1_000_000, 49_999_999, 200_000_000])
def test_copies_outgrow_the_l2_and_a_launch_is_what_is_timed(touched: int) -> None:
    timer = ClockOfLaunches()
    copies = timer.copies(touched)
    assert copies * touched > 2 * timer.l2_bytes
    assert (copies - 1) * touched <= 2 * timer.l2_bytes or copies == 2
    assert timer.time(lambda: [timer.launch] * copies) == pytest.approx((3e-6, 3e-6, 3e-6))
    assert timer.launches > 2e-3 / 3e-6  # a replay is long against what an event resolves


def test_units_of_the_tables() -> None:
    seconds = {"seconds": 2e-6, "seconds_low": 1e-6, "seconds_high": 3e-6, "copy_seconds": 1e-6, "plain_seconds": None}
    row = {"op": "coupling", "mode": "forward", "bytes": 4_000_000, "scratch_bytes": 8000, "note": "", **seconds}
    expected = ["coupling", "forward", "2.00", "1.00 to 3.00", "4.00", "2000", "1.00", "0.50", "-", "8", ""]
    assert gpu_kernels.cells(row) == expected
    assert gpu_steps.cells({"kernels_ms": 2.0, "step_ms": 8.0})[-1] == "75 %"


def test_ours_is_held_to_twice_the_error_of_plain_torch() -> None:
    exact, plain = [torch.tensor([1.0, 100.0], dtype=torch.float64)], [torch.tensor([1.0, 101.0])]
    checks = gpu_smoke.Checks(CPU, None)
    for value in (102.0, 102.1, float("nan")):
        found = [torch.tensor([1.0, value])]
        checks.run("off", lambda found, _: gpu_smoke.output_errors(found, plain, exact), found)
    checks.run("raises", lambda _: [(1 / 0, 1.0)])
    assert [row["passed"] for row in checks.rows] == [True, False, False, False]


def test_stages_fit_into_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later stage may take what an earlier one left over, and no more than that."""
    limits: dict[str, float] = {}

    def run(name: str, line: object, seconds: float, *rest: object) -> gpu_check.Ended:
        limits[name] = seconds
        return gpu_check.Ended(name, "passed", 0.0 if name in ("build", "smoke") else seconds)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: name)
    check = gpu_check.Check(tmp_path, "cuda")
    check.machine()
    for stage in STAGES:
        check.go(stage)
    budgets = {stage.name: stage.seconds for stage in STAGES}
    assert MACHINE_SECONDS + sum(budgets.values()) == TOTAL_SECONDS == 570
    assert limits["kernels"] == budgets["build"] + budgets["smoke"] + budgets["kernels"]
    assert limits["steps"] == budgets["steps"]


def test_a_stage_that_is_stopped_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stage's file of an earlier run stays, and measurements are not written among a rehearsal's."""
    write = "import pathlib, time; pathlib.Path('{out}', 'a.json').write_text('[1]'); print('so far'); time.sleep(600)"
    stages = [Stage("one", 1, "", f'-c "{write}"'), Stage("two", 60, "", '-c "raise SystemExit(7)"')]
    for module in (gpu_check, gpu_stages):
        monkeypatch.setattr(module, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "MACHINE_SECONDS", 0)
    monkeypatch.setattr(gpu_check, "PROBE", "print('{}')")
    for only in ("two", "one"):
        assert gpu_check.main(["--rehearse", "--out", str(tmp_path), "--only", only]) == 1
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")}
    assert (found["one"]["status"], found["one"]["results"], found["one"]["output"]) == ("timeout", [1], "so far\n")
    assert (found["two"]["status"], found["two"]["code"]) == ("failed", 7)
    assert "| one | timeout |" in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])


@pytest.mark.full
@pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
def test_a_rehearsal_with_torch_numpy_safetensors_and_pytest_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=bare_environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    report = (out / "report.md").read_text()
    for stage in STAGES:
        content: dict[str, Any] = json.loads((out / f"{stage.name}.json").read_text())
        assert (content["status"], content["code"]) == ("passed", 0), stage.name
        assert (content["results"] is not None) == ("{out}" in stage.command), stage.name
        assert f"| {stage.name} | passed |" in report
    assert " passed, " in report  # some test has run
    assert "zuko is not installed" in report
