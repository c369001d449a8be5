"""The GPU check on any machine: budgets, command lines, files that outlive a kill, and each stage rehearsed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.bare_python import bare_environment
from support.commands import Command

from bench import gpu_check, gpu_report, gpu_stages
from bench.gpu_stages import MACHINE_SECONDS, NO_KERNELS, STAGES, TOTAL_SECONDS, Stage, command, environment
from pyglow_fast import _backend

compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
BY_NAME = {stage.name: stage for stage in STAGES}
# Options that say how much is run, and the folders of tests: what a rehearsal may have otherwise.
SIZES = {
    *("--shapes", "--configs", "--seconds", "--rounds", "--quick", "--malloc", "--sizes", "--depths", "--limit"),
    *("--passes", "--every"),
}
QUICK = ("build", "smoke", "kernels", "steps", "models_fp32", "memcheck")  # rehearsed in seconds


def stub(name: str, program: str, budget: int = 30, **more: Any) -> Stage:
    """A stage that runs a line of Python, with the folder for its results as its argument."""
    return Stage(name, "a stub", budget, ("-c", program), device="", out="--out", file="", **more)


def check(tmp_path: Path, device: str = "cpu") -> gpu_check.Check:
    return gpu_check.Check(tmp_path / "out", device)


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


class TestRun:
    def test_a_stage_reports_how_it_ended(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        passed = gpu_check.run("a", [sys.executable, "-c", "print('fine')"], 60, log)
        assert (passed.status, passed.tail, passed.code) == ("passed", "fine\n", 0)
        failed = gpu_check.run("b", [sys.executable, "-c", "import sys; sys.exit('broken')"], 60, log)
        assert (failed.status, failed.reason, failed.tail) == ("failed", "exit code 1", "broken\n")
        assert gpu_check.run("c", ["/nowhere/at/all"], 60, log).status == "failed"

    def test_a_stage_and_its_children_end_in_time(self, tmp_path: Path) -> None:
        program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        stage = gpu_check.run("slow", [sys.executable, "-c", program], 1, tmp_path / "log")
        assert stage.status == "timeout"
        assert stage.seconds < 30


class TestBudgets:
    def test_they_add_up(self) -> None:
        assert MACHINE_SECONDS + sum(stage.budget for stage in STAGES) <= TOTAL_SECONDS == 570

    def test_all_stages_at_their_limits_stay_within_the_sum(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever a stage leaves over may be taken by a later one, and no more than that."""
        limits: dict[str, float] = {}

        def run(name: str, line: object, seconds: float, *rest: object) -> gpu_check.Ended:
            limits[name] = seconds
            return gpu_check.Ended(name, "passed", 0.0 if name in ("smoke", "build") else seconds)

        monkeypatch.setattr(gpu_check, "run", run)
        monkeypatch.setattr(gpu_check, "missing_tools", lambda stage, device: [])
        everything = check(tmp_path, "cuda")
        for stage in STAGES:
            everything.go(stage)
        budgets = {stage.name: stage.budget for stage in STAGES}
        assert limits["smoke"] == budgets["build"] + budgets["smoke"]
        assert limits["kernels"] == budgets["build"] + budgets["smoke"] + budgets["kernels"]
        assert limits["steps"] == budgets["steps"]
        assert sum(ended.seconds for ended in everything.ended) == sum(budgets.values())

    def test_no_time_is_not_a_success(self, tmp_path: Path) -> None:
        ended = check(tmp_path, "cuda").go(stub("late", "pass", budget=1))
        assert (ended.status, ended.reason) == ("skipped", gpu_check.NO_TIME)


class TestCommands:
    @pytest.mark.parametrize("name", BY_NAME)
    def test_a_rehearsal_differs_in_device_and_sizes_alone(self, name: str, tmp_path: Path) -> None:
        stage = BY_NAME[name]
        real, rehearsed = (command(stage, device, tmp_path) for device in ("cuda", "cpu"))
        real = real[len(stage.under) :]
        assert real[: 1 + len(stage.program)] == rehearsed[: 1 + len(stage.program)] == [sys.executable, *stage.program]
        kept = []
        for line, device, sizes in ((real, "cuda", stage.sizes), (rehearsed, "cpu", stage.small)):
            rest = line[1 + len(stage.program) :]
            assert not stage.device or rest[:2] == [stage.device, device]
            begin = 2 if stage.device else 0
            assert tuple(rest[begin : begin + len(sizes)]) == sizes
            kept.append(rest[begin + len(sizes) :])
        assert kept[0] == kept[1]
        options = {part for part in (*stage.sizes, *stage.small) if part.startswith("--")}
        assert options <= SIZES

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    @pytest.mark.parametrize("name", [name for name, stage in BY_NAME.items() if stage.program[1].startswith("bench.")])
    def test_its_options_are_known(
        self, name: str, device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The program's own parser refuses one that is added, and no other."""
        stage = BY_NAME[name]
        line = command(stage, device, tmp_path)
        module = importlib.import_module(stage.program[1])
        with pytest.raises(SystemExit):
            module.main([*line[line.index(stage.program[1]) + 1 :], "--no-such-option"])
        assert "unrecognized arguments: --no-such-option\n" in capsys.readouterr().err

    def test_the_build_is_for_this_gpu_with_all_cores(self) -> None:
        found = environment(BY_NAME["build"], "cuda", "9.0")
        assert found["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert (found["PYGLOW_CUDA"], found["PYGLOW_NO_EXTENSION"]) == ("1", "0")
        assert found["MAX_JOBS"] == str(os.cpu_count())
        assert environment(BY_NAME["build"], "cpu", "") == {"PYGLOW_NO_EXTENSION": "1", "OMP_NUM_THREADS": "1"}

    @pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
    def test_the_sanitizer_is_run_as_it_wants(self, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By a stand-in that notes its options and ends as the real one does when it has found something."""
        program = tmp_path / "compute-sanitizer"
        program.write_text(
            '#!/bin/sh\necho "$@" "$PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "== ERROR SUMMARY: 3 errors"\nexit 1\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        ended = check(tmp_path, "cuda").go(BY_NAME[tool])
        assert (ended.status, ended.reason) == ("failed", "exit code 1")
        shown = ended.tail.splitlines()[0]
        assert shown.startswith(f"--tool {tool} --error-exitcode 1 ")
        assert ("--kernel-name kns=pyglow" in shown) == (tool != "initcheck")
        assert shown.endswith(
            f"-m bench.gpu_smoke --unchecked {'ops' if tool == 'initcheck' else 'all'} --device cuda 1"
        )
        assert f"| {tool} | failed |" in (tmp_path / "out" / "report.md").read_text()
        assert "ERROR SUMMARY: 3 errors" in (tmp_path / "out" / "report.md").read_text()

    def test_the_namespace_that_the_sanitizer_filters_by_is_that_of_all_kernels(self) -> None:
        for path in (ROOT / "csrc" / "cuda").glob("*.cu"):
            assert "namespace pyglow" in path.read_text(), path


class TestStages:
    @pytest.fixture(autouse=True)
    def quick_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_check, "PROBE", "print('{}')")

    def main(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[Stage], *options: str) -> int:
        monkeypatch.setattr(gpu_check, "STAGES", tuple(stages))
        monkeypatch.setattr(gpu_report, "STAGES", tuple(stages))
        return gpu_check.main(["--out", str(tmp_path / "out"), *options])

    def test_each_ends_with_a_file_and_the_report(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write = "import pathlib, sys; pathlib.Path(sys.argv[-1], 'a.json').write_text('{\"rows\": [1]}')"
        code = self.main(
            tmp_path, monkeypatch, [stub("one", write), stub("two", "raise SystemExit('bad')")], "--rehearse"
        )
        assert code == 1
        out = tmp_path / "out"
        assert sorted(path.name for path in out.iterdir()) == ["machine.json", "one.json", "report.md", "two.json"]
        assert read(out, "one")["results"] == {"rows": [1]}
        assert (read(out, "two")["status"], read(out, "two")["tail"]) == ("failed", "bad\n")
        report = (out / "report.md").read_text()
        assert "| one | passed |" in report
        assert "| two | failed | 0 | exit code 1 | bad |" in report
        assert "failed: two; wrote" in capsys.readouterr().out

    def test_what_a_stage_had_when_its_time_was_over_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = "import pathlib, sys, time; pathlib.Path(sys.argv[-1], 'a.json').write_text('[1]'); time.sleep(60)"
        monkeypatch.setattr(gpu_check, "MACHINE_SECONDS", 0)
        monkeypatch.setattr(gpu_check, "REHEARSAL_PATIENCE", 1)
        monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 1)
        assert self.main(tmp_path, monkeypatch, [stub("one", write, budget=3)], "--rehearse") == 1
        content = read(tmp_path / "out", "one")
        assert (content["status"], content["results"]) == ("timeout", [1])

    def test_only_some_leave_the_others_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stages = [stub("one", "print(1)"), stub("two", "print(2)"), stub("three", "print(3)")]
        assert self.main(tmp_path, monkeypatch, stages, "--rehearse") == 0
        before = read(tmp_path / "out", "two")
        stages = [stub(stage.name, "raise SystemExit(7)") for stage in stages]
        assert self.main(tmp_path, monkeypatch, stages, "--rehearse", "--only", "one", "three", "--only", "three") == 1
        assert read(tmp_path / "out", "two") == before
        assert [read(tmp_path / "out", name)["code"] for name in ("one", "three")] == [7, 7]
        with pytest.raises(SystemExit):
            self.main(tmp_path, monkeypatch, stages, "--only", "four")

    def test_a_rehearsal_and_measurements_have_folders_of_their_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Else numbers of the one would stand in the report of the other, or in place of them."""
        stages = [stub("build", "print('built')"), stub("smoke", "print('not run')")]
        for first, then, other in ((["--rehearse"], [], "a rehearsal"), ([], ["--rehearse"], "measurements")):
            folder = tmp_path / other
            folder.mkdir()
            self.main(folder, monkeypatch, stages, *first)
            report = (folder / "out" / "report.md").read_text()
            capsys.readouterr()
            with pytest.raises(SystemExit) as raised:
                self.main(folder, monkeypatch, stages, *then)
            assert raised.value.code == 2
            assert f"--out: expected a folder without {other}, found machine, build, smoke" in capsys.readouterr().err
            assert (folder / "out" / "report.md").read_text() == report
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(gpu_check, "STAGES", ())
        assert (gpu_check.main([]), gpu_check.main(["--rehearse"])) == (2, 0)
        assert [
            read(tmp_path / "gpu_check" / name, "machine")["machine"]["rehearsal"] for name in (".", "rehearsal")
        ] == [
            False,
            True,
        ]

    def test_a_file_is_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "out").write_text("")
        with pytest.raises(SystemExit):
            gpu_check.main(["--rehearse", "--out", str(tmp_path / "out")])
        assert "--out: expected a folder for results, found" in capsys.readouterr().err

    def test_a_build_whose_time_is_over_goes_on_the_next_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            gpu_check, "run", lambda name, *rest: gpu_check.Ended(name, "timeout", reason="more than 5 s")
        )
        ended = check(tmp_path).go(stub("build", "pass"))
        assert ended.reason == "more than 5 s; what is compiled is kept: run it again"

    def test_without_a_gpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stages = [stub("build", "print('built')"), stub("smoke", "print('not run')"), stub("kernels", "print('no')")]
        assert self.main(tmp_path, monkeypatch, stages) == 2
        assert read(tmp_path / "out", "build")["status"] == "passed"
        smoke = read(tmp_path / "out", "smoke")
        assert (smoke["status"], smoke["reason"]) == ("skipped", gpu_check.NO_GPU)
        assert f"skipped: smoke, kernels ({gpu_check.NO_GPU})\n" in capsys.readouterr().out

    def test_without_kernels_nothing_else_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        stages = [stub("smoke", f"raise SystemExit({NO_KERNELS})"), stub("kernels", "print('not run')")]
        assert self.main(tmp_path, monkeypatch, stages, "--rehearse") == 1
        assert read(tmp_path / "out", "kernels")["reason"] == "the extension has no kernels for this device"

    def test_programs_that_are_missing_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_stages, "find_tool", lambda name: None)
        everything = check(tmp_path, "cuda")
        build, sanitizer = everything.go(BY_NAME["build"]), everything.go(BY_NAME["memcheck"])
        assert build.reason.startswith("nvcc was not found (install the CUDA toolkit, or set CUDA_HOME), cmake was not")
        assert build.reason.endswith("(pip install cmake, 3.24 or newer), g++ was not found")
        assert (sanitizer.status, sanitizer.reason) == ("skipped", "compute-sanitizer was not found")

    def test_the_report_is_in_the_documentation_of_stages(self) -> None:
        for stage in STAGES:
            assert f"{stage.name:<12} {stage.budget:>3}  {stage.about}" in (gpu_check.__doc__ or "")


@compiled
@pytest.mark.parametrize("name", QUICK)
def test_a_rehearsal_of_a_stage(name: str, tmp_path: Path) -> None:
    """Its command line on a CPU ends well, with results that the report has tables of."""
    stage = BY_NAME[name]
    process = Command(command(stage, "cpu", tmp_path)[1:], ROOT, os.environ | environment(stage, "cpu", ""))
    text = "".join(process.communicate(300))
    assert process.returncode == 0, text[-3000:]
    results = gpu_check.read_results(tmp_path)
    assert (results is not None) == bool(stage.out)
    ended = gpu_check.Ended(name, "passed", 1.0, "", "", text, 0, results)
    report = gpu_report.report_of({name: {"machine": {"rehearsal": True}, **dataclasses.asdict(ended)}})
    assert report.count("\n## ") == (2 if stage.out else 1), report


@compiled
def test_a_kill_leaves_what_had_ended(tmp_path: Path) -> None:
    """A rehearsal is killed while a stage runs: those before it are there, whole, and its process ends, too."""
    out = tmp_path / "out"
    only = ["--only", "build", "smoke", "steps"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--out", str(out), *only],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (out / "smoke.json").is_file() and begun(out / "parts") == {"steps"})
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = ["machine", "build", "smoke"]
    assert {path.stem for path in out.glob("*.json")} == set(ended)
    assert all(read(out, name)["status"] == "passed" for name in ended)
    report = (out / "report.md").read_text()
    assert all(f"| {name} | passed |" in report for name in ended)
    assert len(read(out, "smoke")["results"]["rows"]) > 300
    wait_for(lambda: not still_running(str(out / "parts")))


def begun(parts: Path) -> set[str]:
    """The stages that have begun to write and have not ended."""
    return {path.name for path in parts.iterdir() if path.is_dir()}


def wait_for(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def still_running(text: str) -> list[str]:
    """Command lines of processes that name it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if text in line else []
    return found


@pytest.mark.full
@compiled
def test_a_whole_rehearsal_with_torch_numpy_safetensors_and_pytest(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        env=bare_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "no stage failed; wrote" in done.stdout
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.json")) == sorted(["machine", *BY_NAME])
    for stage in STAGES:
        content = read(tmp_path / "out", stage.name)
        assert (content["status"], content["results"] is not None) == ("passed", bool(stage.out)), stage.name
    report = (tmp_path / "out" / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        *("## Stages", "## First facts", "## Kernels", "## A training step: launches and time", "## Tests"),
        *("## Memory of a training step", "## Scratch of ops: the largest", "## Training steps of whole models"),
    ]
    assert "A rehearsal on a CPU" in report
    assert "| zuko is not installed | 1 |" in report
