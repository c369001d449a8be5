"""The GPU check where there is no GPU: numbers that nobody would see to be wrong, and one rehearsal of everything."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from support.captures import recorded_graphs

from bench import gpu_answers, gpu_check, gpu_kernels, gpu_questions, gpu_smoke, gpu_stages
from bench.cases import Data, kernel_cases
from bench.gpu_stages import MACHINE, PARTLY, STAGES, TOTAL_SECONDS, Stage
from bench.model_cases import Shape
from pyglow_fast._core import backend
from pyglow_fast.runs import drift
from pyglow_fast.train.update import Update

CPU = torch.device("cpu")
# What the package can do without, and what pytest would load by itself.
HIDDEN = [
    *("normflows", "nflows", "FrEIA", "zuko", "memcnn", "matplotlib", "PIL", "torchvision", "sklearn", "scipy", "tqdm"),
    *("rich", "lightning", "pytorch_lightning", "tensorboard", "yaml", "tomli_w", "hypothesis", "mkdocs"),
    *("mkdocstrings", "pymdownx", "xdist", "execnet", "onnx", "jet_pytorch", "anomalib", "TTS", "pandas"),
]


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


def test_units_of_a_row() -> None:
    timer, shape = ClockOfLaunches(), (2, 4, 50, 100)
    timer.time = lambda make: (2e-6, 1e-6, 3e-6)  # type: ignore[method-assign]
    cases = [case for case in kernel_cases(Data(shape, CPU)) if case.name == "coupling forward"]
    row = gpu_kernels.measure(timer, cases, lambda n_bytes: n_bytes / 480_000 * 1e-6)
    assert (row["us"], row["low"], row["high"], row["plain us"]) == pytest.approx((2.0, 1.0, 3.0, 2.0))
    assert (row["MB"], row["GB/s"], row["copy us"], row["share of copy"]) == pytest.approx((0.48, 240.0, 1.0, 0.5))


def test_ours_is_held_to_twice_the_error_of_plain_torch() -> None:
    exact, plain = [torch.tensor([1.0, 100.0], dtype=torch.float64)], [torch.tensor([1.0, 101.0])]
    rows = []
    for value in (102.0, 102.1, float("nan")):
        errors = dict(gpu_smoke.output_errors("op", [torch.tensor([1.0, value])], plain, exact))
        rows.append(gpu_smoke.judged(errors | {"x": (0.0, 1.0)}))
    assert [row["failed"] for row in rows] == [False, True, True]
    assert rows[1]["note"].startswith("op, output 0 off by 2.1e+00")


def test_stages_fit_into_ten_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later stage may take what an earlier one left over, and no more; each is told to stop before it is killed."""
    limits: dict[str, float] = {}

    def run(name: str, line: list[str], seconds: float, *rest: object) -> gpu_check.Ended:
        limits[name] = seconds
        if "--until" in line:
            left = float(line[line.index("--until") + 1]) - time.monotonic()
            assert left <= seconds - min(10, seconds / 4) + 0.1
        return gpu_check.Ended(name, "passed", 0.0 if name in ("build", "answers") else seconds)

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_tool", lambda name, home: name)
    monkeypatch.setattr(gpu_check, "toolkit", lambda: tmp_path)
    check = gpu_check.Check(tmp_path, "cuda")
    check.machine()
    for stage in STAGES:
        check.run(stage)
    budgets = {stage.name: stage.seconds for stage in STAGES}
    assert MACHINE.seconds + sum(budgets.values()) == TOTAL_SECONDS == 570
    assert limits["first"] == budgets["build"] + budgets["first"]
    assert limits["together"] == budgets["answers"] + budgets["together"]
    assert limits["tests"] == budgets["tests"]


def test_a_stage_stops_before_what_would_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it found until then is kept; an error is a row, too."""
    now = [0.0]
    monkeypatch.setattr(gpu_questions.time, "monotonic", lambda: now[0])

    def take(seconds: float) -> None:
        now[0] += seconds

    first = [(f"{seconds} s", functools.partial(take, seconds)) for seconds in (1, 20, 20, 20)]
    options = gpu_questions.stage_options("stage", "")
    given = ["--device", "cpu", "--until", "50", "--out", str(tmp_path / "out.json")]
    # What is late is not even made, which takes time, too.
    assert gpu_questions.ask(options.parse_args(given), (), lambda _: [lambda: first, pytest.fail]) == PARTLY
    assert capsys.readouterr().out.endswith("the time was over after 3 of 4, and 1 more groups\n")
    kept = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["case"] for row in kept] == ["1 s", "20 s", "20 s"]
    (tmp_path / "out.json").unlink()
    now[0] = 0.0
    both = [lambda: [("none", lambda: 1 / 0)], lambda: [("n", dict)]]
    assert gpu_questions.ask(options.parse_args(given), (), lambda _: both) == 1
    shown = capsys.readouterr().out
    assert "FAILED ZeroDivisionError" in shown
    assert shown.endswith("all 2 of 2\n")


def entries(out: Path) -> dict[str, str]:
    """The archive, which is all that there is but the report."""
    assert {path.name for path in out.iterdir()} <= {"gpu_check.zip", "report.md"}
    with zipfile.ZipFile(out / "gpu_check.zip") as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.full
def test_a_stage_that_is_stopped_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stage's results of an earlier run stay, and measurements are not written among a rehearsal's."""
    write = "import pathlib, time; pathlib.Path('{out}').write_text('[1]'); print('so far'); time.sleep(600)"
    some = f"print('the time was over after 1 of 2\\nthe end'); raise SystemExit({PARTLY})"
    stages = [Stage("one", 1, "", f'-c "{write}"'), Stage("two", 60, "", '-c "raise SystemExit(7)"')]
    stages.append(Stage("three", 60, "", f'-c "{some}"'))
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "REHEARSAL_PATIENCE", 3)
    monkeypatch.setattr(gpu_check, "MACHINE", Stage("machine", 1, "", "-c \"print('{}')\""))
    for only, code in (("three", 0), ("two", 1), ("one", 1)):
        assert gpu_check.main(["--rehearse", "--out", str(tmp_path), "--only", only]) == code
    found = {name: json.loads(entries(tmp_path)[f"{name}.json"]) for name in ("one", "two", "three")}
    assert (found["one"]["status"], found["one"]["results"], found["one"]["output"]) == ("timeout", [1], "so far\n")
    assert (found["two"]["status"], found["two"]["code"]) == ("failed", 7)
    assert (found["three"]["status"], found["three"]["reason"]) == ("partly", "the time was over after 1 of 2")
    assert "| one | timeout |" in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])


@pytest.mark.full
def test_a_machine_that_is_slow_has_a_gpu_perhaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program, code, status in (("import time; time.sleep(600)", 1, "passed"), ("print('{}')", 2, "skipped")):
        monkeypatch.setattr(gpu_check, "MACHINE", Stage("machine", 1, "", f'-c "{program}"'))
        monkeypatch.setattr(gpu_check, "STAGES", [Stage("one", 60, "", '-c "pass"')])
        assert gpu_check.main(["--out", str(tmp_path)]) == code
        assert json.loads(entries(tmp_path)["one.json"])["status"] == status


@pytest.mark.full
@pytest.mark.parametrize("first", ["pass", "os._exit(7)"], ids=["late", "died"])
def test_tests_that_were_late_or_stand_behind_one_that_died(tmp_path: Path, first: str) -> None:
    """Pytest itself would say that all is well where tests were late; a process that died is followed by another."""
    (tmp_path / "test_it.py").write_text(f"import os\ndef test_one(): {first}\ndef test_other(): pass\n")
    line = [sys.executable, "-m", "pytest", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", str(tmp_path)]
    line += ["--until", "0"] if first == "pass" else ["--out", str(tmp_path / gpu_check.OUT)]
    ended = gpu_check.run("tests", line, 600, tmp_path, {}, lambda _: None)
    if first == "pass":
        assert (ended.status, ended.reason) == ("partly", "the time was over after 0 of 2")
    else:
        assert (ended.status, ended.code, len(ended.results["rows"])) == ("failed", 7, 2)
        assert "1 passed" in ended.output


@pytest.mark.full
def test_questions_behind_one_that_ended_its_process(tmp_path: Path) -> None:
    """By a fault of the device, a signal, or since it takes too long: it alone is failed, and the stage."""
    program = """
import os, time
from bench import gpu_questions
gpu_questions.LIMITS["cpu"], gpu_questions.is_broken = 3, lambda device: True
asked = [("fault", lambda: 1 / 0), ("crash", lambda: os.kill(os.getpid(), 11)), ("hang", lambda: time.sleep(600))]
given = gpu_questions.stage_options("stage", "").parse_args()
raise SystemExit(gpu_questions.ask(given, (), lambda _: [lambda: [("fine", dict), *asked, ("last", dict)]]))
"""
    line = [sys.executable, "-c", program, "--device", "cpu", "--out", str(tmp_path / gpu_check.OUT)]
    ended = gpu_check.run("stage", line, 600, tmp_path, {}, lambda _: None)
    assert (ended.status, ended.code, ended.results["ended"]) == ("failed", gpu_stages.BROKEN, True)
    failed = {row["case"]: row["failed"] for row in ended.results["rows"]}
    assert failed == {"fine": False, "fault": True, "crash": True, "hang": True, "last": False}
    assert ended.output.count("| last |") == 1


def test_kernels_by_time() -> None:
    row = gpu_answers.launched(lambda: [torch.ones(2).add(1.0) for _ in range(3)], CPU)
    _names, counts, times = zip(*row["kernels"], strict=True)
    assert sum(counts) == row["launches"]
    assert max(counts) >= 3
    assert list(times) == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(1e3 * row["kernels ms"])


@pytest.mark.full
def test_a_check_that_is_killed_leaves_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the stage that it was at, whose children end with it; later runs keep it."""
    pid = tmp_path / "pid"
    program = f"""
from bench import gpu_check
from bench.gpu_stages import Stage
write = "import pathlib, subprocess, time; child = subprocess.Popen(('sleep', '600')); "
write += "pathlib.Path({str(pid)!r}).write_text(str(child.pid)); "
write += "new = pathlib.Path('{{out}}.new'); new.write_text('[1]'); new.rename('{{out}}'); "
write += "print('so far'); time.sleep(600)"
gpu_check.STAGES = [Stage("one", 600, "", f'-c "{{write}}"')]
gpu_check.TICK, gpu_check.MACHINE = 0.1, Stage("machine", 25, "", "-c \\"print('{{}}')\\"")
gpu_check.main(["--rehearse", "--out", {str(tmp_path / "out")!r}])
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 600  # on a machine that others use
    while time.monotonic() < end and not found_so_far(tmp_path / "out"):
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < end and runs(int(pid.read_text())):
        time.sleep(0.1)
    assert not runs(int(pid.read_text()))
    for path in (tmp_path / "out").glob("*.new"):
        path.unlink()
    assert json.loads(entries(tmp_path / "out")["machine.json"])["status"] == "passed"
    monkeypatch.setattr(gpu_check, "STAGES", [Stage(name, 60, "", '-c "pass"') for name in ("one", "two")])
    assert gpu_check.main(["--rehearse", "--out", str(tmp_path / "out"), "--only", "two"]) == 0
    kept = json.loads(entries(tmp_path / "out")["one.json"])
    assert (kept["status"], kept["output"], kept["results"]) == ("unfinished", "so far\n", [1])


def found_so_far(out: Path) -> bool:
    """Whether a check that goes on has results of its stage."""
    if not (out / "gpu_check.zip").is_file():
        return False
    with zipfile.ZipFile(out / "gpu_check.zip") as archive:
        return "one.json" in archive.namelist() and bool(json.loads(archive.read("one.json"))["output"])


def runs(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for a parent to be told."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


TINY = Shape((1, 4, 4), n_levels=1, n_steps=8, hidden=4, batch=2)


@pytest.mark.full
@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_a_graph_that_was_asked_for(memory: str) -> None:
    """Without one the answer is wrong, and says why; recordings in the place of graphs are right."""
    answers = gpu_answers.Answers(CPU, TINY, TINY)
    answers.captures = True
    for context, failed in ((contextlib.nullcontext(), True), (recorded_graphs(), False)):
        with context:
            rows = [answers.step(TINY, "fp32", memory, True), answers.updates(memory)]
            made = gpu_smoke.model_and_images(memory, CPU)
            rows += [gpu_smoke.check_replay(*made, True), gpu_smoke.check_together(*made, True)]
        assert [row["failed"] for row in rows] == [failed] * 4, rows
        expected = "eagerly: the device is cpu; " if failed else "a CUDA graph; "
        assert all(row["note"].startswith(expected) for row in rows)
        assert "; 0 of" in rows[1]["note"]


def test_updates_that_differ_in_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would if a graph kept the learning rate of its capture."""
    true = Update.__call__

    def stale(update: Update, parts: Any, lr: float, *rest: Any) -> Any:
        return true(update, parts, lr * (1 + 1e-6) if update.replays.how == "a CUDA graph" else lr, *rest)

    answers = gpu_answers.Answers(CPU, TINY, TINY)
    monkeypatch.setattr(Update, "__call__", stale)
    with recorded_graphs():
        assert answers.updates("store")["failed"]


def test_anchors_that_move_are_no_difference_of_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "GROW_AFTER", 1)
    answers = gpu_answers.Answers(CPU, TINY, TINY)
    assert not answers.deterministic("reversible")["failed"]
    assert not answers.poisoned("fp32")["failed"]


def test_a_toolkit_is_found_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    is_file, usual = Path.is_file, Path("/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(Path, "is_file", lambda path: path != usual and is_file(path))
    assert gpu_stages.toolkit() is None
    for name in ("links", "toolkit/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "toolkit" / "bin" / "nvcc").touch(mode=0o755)
    (tmp_path / "links" / "nvcc").symlink_to(tmp_path / "toolkit" / "bin" / "nvcc")
    assert gpu_stages.toolkit() == tmp_path / "toolkit"


def test_a_module_that_was_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, tree = tmp_path / "_C.cpython-311-x86_64-linux-gnu.so", tmp_path / "tree"
    module.write_text("compiled")
    (tree / "pyglow_fast").mkdir(parents=True)
    lines: list[list[str]] = []
    monkeypatch.setattr(gpu_check, "ROOT", tree)
    monkeypatch.setattr(
        gpu_check, "run", lambda name, line, *rest: lines.append(line) or gpu_check.Ended(name, "passed")
    )
    check = gpu_check.Check(tmp_path, "cuda", module)
    check.run(check.stages[0])
    assert (tree / "pyglow_fast" / module.name).read_text() == "compiled"
    assert "build_ext" not in lines[0]
    with pytest.raises(SystemExit):
        gpu_check.main(["--module", str(tmp_path / "absent.so"), "--out", str(tmp_path)])


@pytest.mark.full
@pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")
def test_a_rehearsal_with_torch_numpy_safetensors_and_pytest_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--out", str(out)]
    # Python imports a module of this name as it starts. What is None among the modules is not found, nor imported.
    hiding = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN!r}))"
    (tmp_path / "sitecustomize.py").write_text(hiding, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = entries(out)
    report = found["report.md"]
    for stage in STAGES:
        content: dict[str, Any] = json.loads(found[f"{stage.name}.json"])
        assert (content["status"], content["code"]) == ("passed", 0), stage.name
        assert (content["results"] is not None) == ("{out}" in stage.command), stage.name
        assert f"| {stage.name} | passed |" in report
    assert " passed, " in report  # some test has run
    assert "zuko is not installed" in report
