"""Everything that needs a GPU, in one command and less than ten minutes: one JSON, and an exit code.

    python -m bench.gpu_check [--out gpu_check.json] [--minutes 9.5]

Needs a source tree, Python 3.11 or newer with torch built for CUDA, nvcc, a C++ compiler, cmake, ninja and pytest;
nothing is downloaded and nothing is installed: the extension is compiled into the tree. Stages, each with a budget:

    machine      what is there                       tests      the tests that have a CUDA case, on the GPU
    build        the extension, for this GPU only    sanitize   compute-sanitizer over every kernel on small sizes
    kernels, op_memory, models, memory               the benchmarks of these names (where they exist), on the GPU

The file is written anew after every stage, so that a run that is cut off leaves what it had. Exit code: 0 all well; 1 a
stage failed or ran out of time; 2 there is no GPU (then the stages before the tests still run, to the same file).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import ROOT, commit

TAIL = 6000  # characters of output that are kept of a stage
NO_GPU = "no GPU: torch.cuda.is_available() is false here"
# Tests without a device of their own, or of things that a GPU does not change:
WITHOUT_CUDA = ("emulation", "cli", "data", "train", "bench")

# The device as the tests and the benchmarks will see it, printed as JSON by another process, since torch keeps it open.
PROBE = """
import json, sys, torch
found = {"python": sys.version.split()[0], "torch": torch.__version__, "torch_cuda": str(torch.version.cuda)}
if torch.cuda.is_available():
    facts = torch.cuda.get_device_properties(0)
    found |= {"device": facts.name, "capability": f"{facts.major}.{facts.minor}", "memory": facts.total_memory}
print(json.dumps(found))
"""
# Every op once on sizes with ragged ends, forward and backward; for the sanitizer, under which torch itself is slow.
SMALL_RUN = """
import torch
from bench.cases import Data, op_cases
from pyglow_fast import functional
device = torch.device("cuda")
for shape in ((2, 6, 5, 9), (1, 130, 3, 5), (1, 12, 40, 33)):
    for case in op_cases(Data(shape, device)):
        if case.is_ours(device):
            case.build(functional, False)()
            print(case.name, shape, flush=True)
torch.cuda.synchronize()
"""


@dataclasses.dataclass
class Stage:
    """What became of one stage; ``status`` is passed, failed, timeout or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""
    reason: str = ""
    tail: str = ""
    results: Any = None


def run(name: str, command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> Stage:
    """Run a command in the source tree; it and its children end when the time is over."""
    start = time.monotonic()
    shown = " ".join(part if "\n" not in part else "..." for part in command)
    print(f"== {name}: {shown} (at most {seconds:.0f} s)", flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Stage(name, "failed", 0.0, shown, f"cannot start: {error}")
        try:
            code = process.wait(timeout=max(1.0, seconds))
            status, reason = ("passed", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            status, reason = "timeout", f"more than {seconds:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        tail = output.read()[-TAIL:]
    return Stage(name, status, round(time.monotonic() - start, 1), shown, reason, tail)


class Check:
    """The stages one after another, under one deadline, and the file that they are written to."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.start, self.deadline = out, time.monotonic(), time.monotonic() + 60 * minutes
        self.stages: list[Stage] = []
        self.facts: dict[str, Any] = {"commit": commit()}
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu_check-"))

    def left(self, budget: float) -> float:
        """Seconds that a stage may take."""
        return min(budget, self.deadline - time.monotonic())

    def add(self, stage: Stage) -> Stage:
        """Report a stage and write the file."""
        self.stages.append(stage)
        print(f"   {stage.status} after {stage.seconds:.0f} s {stage.reason}".rstrip(), flush=True)
        if stage.status in ("failed", "timeout"):
            print(stage.tail, flush=True)
        content = {
            "machine": self.facts,
            "seconds": round(time.monotonic() - self.start, 1),
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }
        self.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return stage

    def skip(self, name: str, reason: str) -> Stage:
        """A stage that does not run."""
        print(f"== {name}", flush=True)
        return self.add(Stage(name, "skipped", reason=reason))

    def go(self, name: str, command: Sequence[str], budget: float, environment: dict[str, str] | None = None) -> Stage:
        """Run a stage, if there is time."""
        seconds = self.left(budget)
        if seconds < 5:
            return self.skip(name, "no time is left")
        return self.add(run(name, command, seconds, environment))

    def machine(self) -> bool:
        """What is there; whether there is a GPU."""
        stage = run("machine", [sys.executable, "-c", PROBE], self.left(60))
        with contextlib.suppress(ValueError, IndexError):
            self.facts |= json.loads(stage.tail.splitlines()[-1])
        for tool in ("nvcc", "nvidia-smi", "compute-sanitizer", "cmake", "ninja", "g++"):
            self.facts[tool] = find_tool(tool) or "not found"
        self.add(stage)
        return "capability" in self.facts

    def build(self) -> Stage:
        """Compile the extension into the tree, for this GPU alone."""
        environment = {"PYGLOW_NO_EXTENSION": "0", "PYGLOW_CUDA": "1" if find_tool("nvcc") else "auto"}
        if "capability" in self.facts:
            environment["TORCH_CUDA_ARCH_LIST"] = self.facts["capability"]
        budget = 200 if "capability" in self.facts else 600  # without a GPU nothing else needs the time
        return self.go("build", [sys.executable, "setup.py", "build_ext", "--inplace"], budget, environment)

    def tests(self) -> None:
        """The tests with a CUDA case."""
        ignored = [f"--ignore=tests/{name}" for name in WITHOUT_CUDA if (ROOT / "tests" / name).exists()]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests", *ignored, "-p", "no:cacheprovider"]
        self.go("tests", [*command, "--continue-on-collection-errors"], 180)

    def sanitize(self) -> None:
        """compute-sanitizer: reads and writes out of bounds, then races in shared memory."""
        program = find_tool("compute-sanitizer")
        for tool, budget in (("memcheck", 60.0), ("racecheck", 45.0)):
            name = f"sanitize {tool}"
            if program is None:
                self.skip(name, "compute-sanitizer was not found")
            else:
                # torch's allocator would hand out memory beside memory; without it every tensor has its own bounds.
                environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
                command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", SMALL_RUN]
                self.go(name, command, budget, environment)

    def benchmark(self, name: str, options: Sequence[str], budget: float, result: Path) -> None:
        """``python -m bench.NAME``, its JSON taken over."""
        if not (ROOT / "bench" / f"{name}.py").is_file():
            self.skip(name, f"bench/{name}.py is not there")
            return
        stage = self.go(name, [sys.executable, "-m", f"bench.{name}", *options], budget)
        if result.is_file():
            with contextlib.suppress(ValueError):
                stage.results = json.loads(result.read_text(encoding="utf-8"))
        self.stages.pop()
        self.add(stage)

    def benchmarks(self) -> None:
        """Kernels, scratch, models and memory curves."""
        cuda, folder = ["--device", "cuda"], self.scratch
        kernels = [*cuda, "--compile", "--peers", "--out", str(folder)]
        self.benchmark("kernels", kernels, 120, folder / "kernels-cuda.json")
        self.benchmark("op_memory", [*cuda, "--out", str(folder / "op.json")], 30, folder / "op.json")
        for name in ("models", "memory"):
            self.benchmark(name, [*cuda, "--quick", "--out", str(folder)], 90, folder / f"{name}-cuda.json")


def find_tool(name: str) -> str | None:
    """The path of a program: on PATH, beside this Python, or in the CUDA toolkit's folder."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which(name, path=os.pathsep.join(places))


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0, 1 or 2, as the module says.
    """
    options = argparse.ArgumentParser(
        prog="bench gpu_check", description="build, tests, sanitizer and benchmarks on a GPU", allow_abbrev=False
    )
    options.add_argument("--out", type=Path, metavar="FILE", default=Path("gpu_check.json"), help="(gpu_check.json)")
    options.add_argument("--minutes", type=float, default=9.5, help="for everything together (9.5)")
    arguments = options.parse_args(argv)
    check = Check(arguments.out.resolve(), arguments.minutes)
    has_gpu = check.machine()
    built = check.build().status == "passed"
    if not has_gpu:
        check.skip("tests, sanitize, kernels, op_memory, models, memory", NO_GPU)
        print(f"{NO_GPU}; {'built' if built else 'the build failed'}; wrote {check.out}")
        return 2
    if built:
        check.tests()
        check.sanitize()
        check.benchmarks()
    else:
        check.skip("tests and everything after them", "the extension was not built")
    shutil.rmtree(check.scratch, ignore_errors=True)
    bad = [stage.name for stage in check.stages if stage.status in ("failed", "timeout")]
    late = [stage.name for stage in check.stages if stage.reason == "no time is left"]
    print(f"{'failed: ' + ', '.join(bad + late) if bad or late else 'all stages passed'}; wrote {check.out}")
    return 1 if bad or late or not built else 0


if __name__ == "__main__":
    raise SystemExit(main())
