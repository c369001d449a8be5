"""The stages of the GPU check: what each one runs, for how long at most, and how it is rehearsed on a CPU.

A stage's command is made in one place, :func:`command`. A rehearsal runs the same command with the device "cpu" and the
sizes of :attr:`Stage.small`, and without the program that it is run under on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TOTAL_SECONDS = 570  # of all stages, so that the whole fits into ten minutes
NO_KERNELS = 3  # exit code of bench.gpu_smoke where the extension has none for the device: nothing after it is worth it
OURS_AND_PLAIN = "store,reversible,plain"
PYTEST = ("-m", "pytest", "-q", "-p", "bench.gpu_tests", "-p", "no:cacheprovider", "--continue-on-collection-errors")
OUR_KERNELS = ("--kernel-name", "kns=pyglow")  # torch's own are many, and not what is checked


@dataclass(frozen=True)
class Stage:
    """One stage of the GPU check: a program, its options on a GPU and in a rehearsal, and its seconds.

    ``program``: what Python runs. ``sizes``: its options that say how much, on a GPU; ``small``: in a rehearsal.
    ``out``: the option that takes where results are written, to a file of that name or, if there is none, a folder.
    ``under``: the program that it runs under on a GPU, with its options. ``needs``: programs without which it cannot
    run there.
    """

    name: str
    about: str
    budget: int
    program: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    device: str = "--device"
    out: str = "--out"
    file: str = "results.json"
    under: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def _sanitizer(tool: str, budget: int, about: str, *options: str, what: str = "all") -> Stage:
    return Stage(
        tool,
        f"compute-sanitizer: {about}",
        budget,
        ("-m", "bench.gpu_smoke", "--unchecked", what),
        out="",
        # Errors of calls that torch makes to see what a driver can do are no faults.
        under=("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", *options),
        needs=("compute-sanitizer",),
        # torch's allocator would hand out memory beside memory; without it every tensor has its own bounds.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _models(
    name: str, about: str, budget: int, precision: str, *sizes: str, small: str = "b", compiled: str = ""
) -> Stage:
    """A stage of bench.models; ``small``: the configuration whose tiny form rehearses it."""
    program: tuple[str, ...] = ("-m", "bench.models", "--workloads", "train step", "--implementations", OURS_AND_PLAIN)
    program += ("--compile", compiled) if compiled else ()
    quick = ("--quick", "--rounds", "1", "--malloc", "here")
    return Stage(
        name,
        about,
        budget,
        (*program, "--precision", precision),
        sizes=sizes,
        small=("--configs", small, *quick),
        file="",
    )


STAGES = (
    Stage(
        "build",
        "the extension, for this GPU alone",
        80,
        ("setup.py", "build_ext", "--inplace"),
        device="",
        out="",
        needs=("nvcc", "cmake", "g++"),
    ),
    Stage(
        "smoke",
        "every op, a step in each memory mode and CUDA graphs, against float64",
        40,
        ("-m", "bench.gpu_smoke"),
    ),
    Stage(
        "kernels",
        "microseconds of every op, beside the copy and what was predicted",
        60,
        ("-m", "bench.gpu_kernels"),
        small=("--shapes", "1x4x3x5"),
    ),
    Stage(
        "steps",
        "launches and times of a training step, by the profiler",
        35,
        ("-m", "bench.gpu_steps"),
        small=("--quick",),
    ),
    Stage(
        "tests",
        "the tests that have a case on a GPU",
        75,
        PYTEST,
        sizes=("tests",),
        small=("tests/layers", "tests/models", "--every", "8"),
        device="--on",
        out="--tally",
        file="tally.jsonl",
    ),
    _models("models", "training steps, TF32 as torch has it", 35, "tf32", "--configs", "a,b", "--seconds", "9"),
    _models(
        "compiled",
        "training steps against plain torch under torch.compile",
        50,
        "tf32",
        *("--configs", "c", "--seconds", "5"),
        small="d",
        compiled="plain",
    ),
    _models("models_fp32", "training steps without TF32", 20, "fp32", "--configs", "b", "--seconds", "5"),
    _models("models_bf16", "training steps in bfloat16", 25, "bf16", "--configs", "b", "--seconds", "5"),
    Stage(
        "memory",
        "memory of a training step against K at 256 and 1024 pixels",
        30,
        ("-m", "bench.memory", "--only", "large", "--implementations", OURS_AND_PLAIN),
        sizes=("--sizes", "256,1024", "--depths", "4,16", "--limit", "60", "--passes", "1"),
        small=("--sizes", "32", "--depths", "1", "--quick", "--passes", "0"),
        file="",
    ),
    _sanitizer("memcheck", 35, "accesses out of bounds or not aligned", *OUR_KERNELS),
    _sanitizer("racecheck", 25, "races in shared memory", *OUR_KERNELS),
    Stage("op_memory", "scratch of every op", 10, ("-m", "bench.op_memory"), small=("--shapes", "1x4x3x5")),
    _sanitizer("synccheck", 10, "barriers", *OUR_KERNELS),
    # Every kernel is watched, since what torch's kernels write is initialised, too; but in ops alone, since the
    # libraries' kernels read what they do not use.
    _sanitizer("initcheck", 10, "reads of what was never written", what="ops"),
)
MACHINE_SECONDS = 30  # the first stage: what is there


def command(stage: Stage, device: str, folder: Path) -> list[str]:
    """The command line of a stage: on "cuda" the check itself, on "cpu" its rehearsal.

    ``folder``: where results are written.
    """
    under = [find_tool(stage.under[0]) or stage.under[0], *stage.under[1:]] if stage.under and device == "cuda" else []
    line = [*under, sys.executable, *stage.program]
    if stage.device:
        line += [stage.device, device]
    line += stage.sizes if device == "cuda" else stage.small
    if stage.name == "tests" and importlib.util.find_spec("xdist") is not None:
        line += ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    if stage.out:
        line += [stage.out, str(folder / stage.file) if stage.file else str(folder)]
    return line


def environment(stage: Stage, device: str, capability: str) -> dict[str, str]:
    """What a stage's process has in its environment beside ours.

    A rehearsal of the build builds nothing; all others have one thread, since waking a second one costs more than the
    arithmetic of their tiny models.
    """
    found = dict(stage.environment) | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
    if stage.name == "build":
        found |= {"PYGLOW_NO_EXTENSION": "0" if device == "cuda" else "1"}
        if device == "cuda":
            found |= {"PYGLOW_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
            found |= {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
    return found


def missing_tools(stage: Stage, device: str) -> list[str]:
    """The programs that a stage needs on a GPU and that are not there."""
    return [name for name in stage.needs if find_tool(name) is None] if device == "cuda" else []


def find_tool(name: str) -> str | None:
    """The path of a program: on PATH, beside this Python, or in the CUDA toolkit's folder."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), f"{home}/bin", f"{home}/compute-sanitizer"]
    return shutil.which(name, path=os.pathsep.join(places))
