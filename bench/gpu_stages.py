"""The stages of the GPU check: their command lines, on a GPU and in a rehearsal on the CPU, and their seconds."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

TOTAL_SECONDS = 570  # of all stages, so that the whole fits into ten minutes
MACHINE_SECONDS = 30  # of the first stage: what is there
NO_KERNELS = 3  # exit code of bench.gpu_smoke where the extension has none for the device: no later stage is worth it
# Where programs are looked for: on PATH, beside this Python, and in the CUDA toolkit's folder.
HOME = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
FOLDERS = [str(Path(sys.executable).parent), f"{HOME}/bin", f"{HOME}/compute-sanitizer"]
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS])
# Errors of calls that torch makes to see what a driver can do are no faults.
SANITIZER = "compute-sanitizer --error-exitcode 1 --report-api-errors no --tool"
OUR_KERNELS = "--kernel-name kns=pyglow"  # torch's own are many, and not what is checked
IMPLEMENTATIONS = "--implementations store,reversible,plain"


@dataclass(frozen=True)
class Stage:
    """One stage: the options of the Python that it runs, and its seconds.

    ``{device}`` in ``command`` is cuda, or cpu in a rehearsal; ``{out}`` is the folder that takes its results. ``gpu``
    and ``cpu`` are the options behind it that say how much is run, there and in a rehearsal. On a GPU it runs under the
    program ``under``, and is skipped where one of the programs ``needs`` is missing. The report shows the last
    ``shown`` lines of its output.
    """

    name: str
    seconds: int
    about: str
    command: str
    gpu: str = ""
    cpu: str = ""
    under: str = ""
    needs: tuple[str, ...] = ()
    shown: int = 400


def _own(name: str, seconds: int, about: str, cpu: str = "", shown: int = 400) -> Stage:
    command = f"-m bench.gpu_{name} --device {{device}} --out {{out}}/results.json"
    return Stage(name, seconds, about, command, cpu=cpu, shown=shown)


def _models(name: str, seconds: int, about: str, options: str, gpu: str, config: str = "b") -> Stage:
    command = f"-m bench.models --workloads 'train step' {IMPLEMENTATIONS} --device {{device}} --out {{out}} {options}"
    return Stage(name, seconds, about, command, gpu, f"--configs {config} --quick --rounds 1 --malloc here")


def _sanitizer(tool: str, seconds: int, about: str, kernels: str = OUR_KERNELS, checks: str = "all") -> Stage:
    command, under = f"-m bench.gpu_smoke --unchecked {checks} --device {{device}}", f"{SANITIZER} {tool} {kernels}"
    needs = ("compute-sanitizer",)
    return Stage(tool, seconds, f"compute-sanitizer: {about}", command, under=under, needs=needs, shown=10)


STAGES = (
    Stage(
        "build",
        80,
        "the extension, for this GPU alone",
        "setup.py build_ext --inplace",
        needs=("nvcc", "cmake", "g++"),
        shown=10,
    ),
    _own("smoke", 50, "every op, a step in each memory mode and CUDA graphs, against float64", shown=40),
    _own("kernels", 60, "microseconds of every op, beside a copy, and its scratch memory", "--shapes 1x4x3x5"),
    _own("steps", 35, "launches and times of a training step, by the profiler", "--quick"),
    Stage(
        "tests",
        75,
        "the tests that have a case on a GPU",
        "-m pytest tests -v -r sfE -p bench.gpu_tests -p no:cacheprovider --continue-on-collection-errors",
        gpu="-m cuda",
        cpu="-k 'actnorm and cpu'",
        shown=150,
    ),
    _models("models", 35, "training steps, TF32 as torch has it", "--precision tf32", "--configs a,b --seconds 9"),
    _models(
        "compiled",
        50,
        "training steps against plain torch under torch.compile",
        "--precision tf32 --compile plain",
        "--configs c --seconds 5",
        config="d",
    ),
    _models("models_fp32", 20, "training steps without TF32", "--precision fp32", "--configs b --seconds 5"),
    _models("models_bf16", 25, "training steps in bfloat16", "--precision bf16", "--configs b --seconds 5"),
    Stage(
        "memory",
        30,
        "memory of a training step against K at 256 and 1024 pixels",
        f"-m bench.memory --only large {IMPLEMENTATIONS} --device {{device}} --out {{out}}",
        gpu="--sizes 256,1024 --depths 4,16 --limit 60 --passes 1",
        cpu="--sizes 32 --depths 1 --quick --passes 0",
    ),
    _sanitizer("memcheck", 35, "accesses out of bounds or not aligned"),
    _sanitizer("racecheck", 25, "races in shared memory"),
    _sanitizer("synccheck", 10, "barriers"),
    # Every kernel is watched, since what torch's kernels write is initialised, too; but in ops alone, since the
    # libraries' kernels read what they do not use.
    _sanitizer("initcheck", 10, "reads of what was never written", kernels="", checks="ops"),
)


def command(stage: Stage, device: str, out: Path) -> list[str]:
    """The command line of a stage: on "cuda" the check itself, on "cpu" its rehearsal."""
    line = [part.format(device=device, out=out) for part in shlex.split(stage.command)]
    if stage.name == "tests" and importlib.util.find_spec("xdist") is not None:
        line += ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    if device == "cpu":
        return [sys.executable, *line, *shlex.split(stage.cpu)]
    return [*shlex.split(stage.under), sys.executable, *line, *shlex.split(stage.gpu)]


def environment(stage: Stage, device: str, capability: str) -> dict[str, str]:
    """Variables for a stage's process. A rehearsal of the build builds nothing; others have one thread.

    Waking a second thread costs more than the arithmetic of tiny models.
    """
    found = {"PATH": SEARCH_PATH} | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    if stage.under:  # torch's allocator would hand out memory beside memory; now every tensor has its own bounds
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if stage.name == "build":
        found["PYGLOW_NO_EXTENSION"] = "0" if device == "cuda" else "1"
        if device == "cuda":
            found |= {"PYGLOW_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
            found |= {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
    return found


def find_tool(name: str) -> str | None:
    """The path of a program."""
    return shutil.which(name, path=SEARCH_PATH)
