"""The stages of the GPU check: their command lines, on a GPU and in a rehearsal on the CPU, and their seconds."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOTAL_SECONDS = 570  # of all stages, so that the whole fits into ten minutes
# Errors of calls that torch makes to see what a driver can do are no faults.
SANITIZER = "compute-sanitizer --error-exitcode 1 --report-api-errors no --kernel-name kns=pyglow --tool"
TESTS = " ".join(f"tests/{name}" for name in ("kernels", "core", "nets", "layers", "models", "runs"))
# Exit codes of a stage, which neither Python nor pytest has: the extension has no kernels for the device, so that no
# later stage is worth it; the time was over before all was done, of which a line that begins with LATE tells; a fault
# has left the device unusable for the process.
NO_KERNELS, PARTLY, BROKEN = 93, 94, 95
LATE = "the time was over after"


# The device as the tests and the benchmarks will see it, printed as JSON by another process, since torch keeps it open.
PROBE = """
import importlib.metadata, json, subprocess, sys, torch
found = {"python": sys.version.split()[0], "torch": torch.__version__, "torch_cuda": str(torch.version.cuda)}
others = ("numpy", "safetensors", "pytest", "setuptools")
found |= {package.name: package.version for package in importlib.metadata.distributions() if package.name in others}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found |= {"device": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory}
    found |= {"multiprocessors": gpu.multi_processor_count, "L2": gpu.L2_cache_size}
    asked = "timeout 10 nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit --format=csv,noheader"
    found["driver, clock, power"] = subprocess.getoutput(asked)
print(json.dumps(found))
"""
LOADS = "from pyglow_fast._core import backend; assert backend.extension() is not None, backend.reason()"


@dataclass(frozen=True)
class Stage:
    """One stage: the options of the Python that it runs, and its seconds.

    In ``command`` {device} is cuda, or cpu in a rehearsal; {out} the file that takes its results; {until} when it
    begins nothing more, by time.monotonic(), the same in all processes. ``gpu`` and ``cpu`` are the options behind it
    that say how much is run, there and in a rehearsal. On a GPU it runs under the program ``under``, and is skipped
    where one of the programs ``needs`` is missing. ``allocator``: how torch's allocator is set. The report shows the
    last ``shown`` lines of its output.
    """

    name: str
    seconds: int
    about: str
    command: str
    gpu: str = ""
    cpu: str = ""
    under: str = ""
    needs: tuple[str, ...] = ()
    allocator: str = ""
    shown: int = 400


def _asks(name: str, seconds: int, about: str, options: str, **more: Any) -> Stage:
    """A stage that asks questions (gpu_questions.py)."""
    line = f"-m bench.gpu_{options} --device {{device}} --until {{until}} --out {{out}}"
    return Stage(name, seconds, about, line, **more)


def _sanitizer(tool: str, seconds: int, about: str) -> Stage:
    about, needs = f"compute-sanitizer: {about}", ("compute-sanitizer",)
    return _asks(tool, seconds, about, "smoke --unchecked", under=f"{SANITIZER} {tool}", needs=needs, shown=10)


# It comes before the others, always. What it leaves of its time, which the first import of torch may take, is theirs.
MACHINE = Stage("machine", 60, "what is there", f"-c {shlex.quote(PROBE)}")
GIVEN = Stage("build", 100, "the extension that was given", f"-c {shlex.quote(LOADS)}")  # in the place of a build
BUILD = "setup.py build_ext --inplace"
STAGES = (
    Stage("build", 100, "the extension, for this GPU alone", BUILD, needs=("cmake", "g++"), shown=10),
    _asks("first", 20, "ten seconds of the smoke", "smoke --only 'step, store' decode 2x4x5x9"),
    _asks("answers", 150, "nets, steps, 20 updates, determinism, poisoned memory", "answers", cpu="--quick"),
    _asks("together", 12, "graphs of training and of sampling, replayed in turn", "smoke --only 'graphs of'"),
    _asks("broken", 12, "a capture that CUDA breaks off, and what runs after it", "smoke --only broken"),
    _asks("expandable", 12, "all graphs", "smoke --only graph", allocator="expandable_segments:True"),
    _asks("async", 12, "all graphs", "smoke --only graph", allocator="backend:cudaMallocAsync"),
    _asks("kernels", 45, "us of every op, beside a copy", "kernels", cpu="--shapes 1x4x3x5"),
    _asks("smoke", 30, "every op, a step in each memory mode and CUDA graphs, against float64", "smoke"),
    Stage(
        "tests",
        60,
        "the tests that have a case on a GPU",
        f"-m pytest {TESTS} -v -r sfE -p bench.gpu_tests --until {{until}} --out {{out}} -p no:cacheprovider "
        "--continue-on-collection-errors",
        gpu="-m cuda",
        cpu="-k 'actnorm and cpu'",
        shown=150,
    ),
    _sanitizer("memcheck", 32, "accesses out of bounds or not aligned"),
    _sanitizer("racecheck", 15, "races in shared memory"),
    _sanitizer("synccheck", 10, "barriers"),
)


def command(stage: Stage, device: str, out: Path, until: float) -> list[str]:
    """The command line of a stage: on "cuda" the check itself, on "cpu" its rehearsal."""
    values = {"{device}": device, "{out}": str(out), "{until}": f"{until:.1f}"}
    line = shlex.split(stage.command)
    for name, value in values.items():
        line = [part.replace(name, value) for part in line]
    if device == "cpu":
        return [sys.executable, *line, *shlex.split(stage.cpu)]
    return [*shlex.split(stage.under), sys.executable, *line, *shlex.split(stage.gpu)]


def environment(stage: Stage, device: str, capability: str, home: Path | None) -> dict[str, str]:
    """Variables for a stage's process. A rehearsal of the build builds nothing; others have one thread."""
    found = {"PATH": search_path(home), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which deterministic products want
    found |= {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    if stage.allocator:
        found["PYTORCH_CUDA_ALLOC_CONF"] = stage.allocator
    if stage.under:  # torch's allocator would hand out memory beside memory; now every tensor has its own bounds
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if stage.name == "build":
        found["PYGLOW_NO_EXTENSION"] = "0" if device == "cuda" else "1"
        if device == "cuda":
            found |= {"PYGLOW_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
            found |= {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
            found |= {} if home is None else {"CUDA_HOME": str(home)}
    return found


def toolkit() -> Path | None:
    """The folder of a CUDA toolkit with nvcc: CUDA_HOME's, the usual one, or that of the nvcc on PATH."""
    on_path = Path(shutil.which("nvcc") or "none").resolve().parent.parent
    homes = (Path(os.environ.get("CUDA_HOME") or on_path), Path("/usr/local/cuda"), on_path)
    return next((home for home in homes if (home / "bin" / "nvcc").is_file()), None)


def search_path(home: Path | None) -> str:
    """List where programs are looked for: on PATH, beside this Python, and in the CUDA toolkit's folder."""
    folders = [] if home is None else [f"{home}/bin", f"{home}/compute-sanitizer"]
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), *folders])


def find_tool(name: str, home: Path | None) -> str | None:
    """The path of a program."""
    return shutil.which(name, path=search_path(home))
