"""Everything that needs a GPU, in one command and less than ten minutes: a report, a JSON of each stage, an exit code.

    python -m bench.gpu_check [--out FOLDER] [--only STAGE ...] [--rehearse]

Needs a source tree, Python 3.11 or newer with torch built for CUDA, numpy, safetensors and pytest, nvcc, a C++ compiler
and cmake; the extension is compiled into the tree, and nothing is downloaded or installed. What else is missing, such
as compute-sanitizer, is skipped by name. Stages, with the seconds that each may take besides what those before it left:

{stages}

A stage writes STAGE.json into the folder as it ends, and report.md, which has what all of them printed, is made anew: a
run that is killed leaves what had ended, and what the stage that it was at had written, in parts/. ``--only`` runs some
stages alone and leaves the others' files. ``--rehearse`` runs every command on the CPU with tiny sizes, where numbers
mean nothing, and has a folder of its own. Exit code: 0 all well; 1 a stage failed or ran out of time; 2 there is no GPU
(then only the build runs), or the options are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_stages import MACHINE_SECONDS, NO_KERNELS, STAGES, Stage, command, environment, find_tool
from bench.harness import ROOT, commit

_ABOUT = [f"    {stage.name:<12} {stage.seconds:>3}  {stage.about}" for stage in STAGES]
__doc__ = (__doc__ or "").format(
    stages="\n".join([f"    {'machine':<12} {MACHINE_SECONDS:>3}  what is there", *_ABOUT])
)
KEPT = 400_000  # characters of a stage's output, its end
REHEARSAL_PATIENCE = 4  # times the seconds of a stage, on a machine that other tests are running on
NO_GPU = "no GPU: torch.cuda.is_available() is false here"
PARTS = "parts"  # the folder that stages write to while they run
MEASURED, REHEARSED = Path("gpu_check"), Path("gpu_check", "rehearsal")  # folders, if none is given
TOOLS = ("nvcc", "g++", "cmake", "ninja", "nvidia-smi", "compute-sanitizer")
WHAT_TO_DO = {"cmake": " (pip install cmake, 3.24 or newer)", "nvcc": " (install the CUDA toolkit, or set CUDA_HOME)"}
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


@dataclasses.dataclass
class Ended:
    """The outcome of a stage; ``status`` is passed, failed, timeout or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""
    reason: str = ""
    output: str = ""
    code: int | None = None
    results: Any = None


def _end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however that does (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def run(name: str, line: Sequence[str], seconds: float, log: Path, more: Mapping[str, str]) -> Ended:
    """Run a command in the source tree; it and its children end when the time is over. ``log`` takes its output."""
    start = time.monotonic()
    shown = " ".join([part if "\n" not in part else "..." for part in line])
    print(f"== {name}: {shown} (at most {seconds:.0f} s)", flush=True)
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                line,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            return Ended(name, "failed", 0.0, shown, f"cannot start: {error}")
        code = None
        try:
            code = process.wait(timeout=max(1.0, seconds))
            status, reason = ("passed", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            status, reason = "timeout", f"more than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()[-KEPT:]
    return Ended(name, status, round(time.monotonic() - start, 1), shown, reason, text, code)


def read_results(folder: Path) -> Any:
    """Reads what a stage has written: its JSON, or a list of several; None if nothing."""
    found: list[Any] = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            found.append(json.loads(path.read_text(encoding="utf-8")))
    return found[0] if len(found) == 1 else found or None


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the files of the stages that have ended, in the order of the stages."""
    paths = {name: folder / f"{name}.json" for name in ("machine", *(stage.name for stage in STAGES))}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def report(folder: Path) -> str:
    """Makes Markdown of a folder: the machine, a table of the stages, and the end of what each of them printed."""
    ended = read(folder)
    facts: Mapping[str, Any] = ended["machine"]["machine"]  # other stages may be of an earlier run
    lines = ["# GPU check", ""]
    if facts["rehearsal"]:
        lines += ["A rehearsal on a CPU with tiny sizes: no number here means anything.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, content in ended.items():
        differing = [f"{key} {value}" for key, value in content["machine"].items() if facts.get(key) != value]
        lines += [f"- of an earlier run is {name}: {', '.join(differing)}"] if differing else []
    lines += ["", "| stage | status | s | why |", "|---|---|---:|---|"]
    lines += [f"| {name} | {c['status']} | {c['seconds']:.0f} | {c['reason']} |" for name, c in ended.items()]
    for stage in STAGES:
        output = ended.get(stage.name, {}).get("output", "").splitlines()[-stage.shown :]
        if output:
            lines += ["", f"## {stage.name}: {stage.about}", "", "````text", *output, "````"]
    return "\n".join(lines) + "\n"


class Check:
    """The stages one after another, and the folder that they are written to."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.patience = REHEARSAL_PATIENCE if device == "cpu" else 1
        self.saved = 0.0  # seconds that the stages so far have left over
        self.facts: dict[str, Any] = {"commit": commit(), "rehearsal": device == "cpu"}
        self.ended: list[Ended] = []

    def add(self, ended: Ended) -> None:
        """Report a stage, write its file, and make the report anew."""
        self.ended.append(ended)
        print(f"   {ended.status} after {ended.seconds:.0f} s {ended.reason}".rstrip(), flush=True)
        if ended.status in ("failed", "timeout"):
            print("\n".join(ended.output.splitlines()[-60:]), flush=True)
        content = {"machine": self.facts, **dataclasses.asdict(ended)}
        _write(self.out / f"{ended.name}.json", json.dumps(content, indent=1) + "\n")
        _write(self.out / "report.md", report(self.out))
        shutil.rmtree(self.out / PARTS / ended.name, ignore_errors=True)

    def machine(self) -> bool:
        """Look up what is there; tells whether there is a GPU."""
        ended = self._timed("machine", [sys.executable, "-c", PROBE], MACHINE_SECONDS, {})
        with contextlib.suppress(ValueError, IndexError):
            self.facts |= json.loads(ended.output.splitlines()[-1])
        self.facts |= {tool: find_tool(tool) or "not found" for tool in TOOLS}
        self.add(ended)
        return "capability" in self.facts

    def go(self, stage: Stage, without: str = "") -> None:
        """Run a stage; or skip it for the reason ``without``, or for want of a program."""
        absent = [name for name in stage.needs if self.device == "cuda" and find_tool(name) is None]
        reason = without or ", ".join(f"{name} was not found{WHAT_TO_DO.get(name, '')}" for name in absent)
        if reason:
            self.add(Ended(stage.name, "skipped", reason=reason))
            return
        line = command(stage, self.device, self.out / PARTS / stage.name)
        more = environment(stage, self.device, self.facts.get("capability", ""))
        ended = self._timed(stage.name, line, stage.seconds, more)
        if stage.name == "build" and ended.status == "timeout":
            ended.reason += "; what is compiled is kept: run it again"
        self.add(ended)

    def _timed(self, name: str, line: Sequence[str], seconds: float, more: Mapping[str, str]) -> Ended:
        folder = self.out / PARTS / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        limit = self.patience * seconds + self.saved
        ended = run(name, line, limit, folder / "log", more)
        ended.results = read_results(folder)
        self.saved = limit - ended.seconds
        return ended


def _write(path: Path, text: str) -> None:
    """Put a file in its place whole: a kill leaves the one before or this one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for, and write the report; 0, 1 or 2, as the module says.

    Args:
        argv: the options; those of the process if None.
    """
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser("bench gpu_check", description=__doc__, formatter_class=raw, allow_abbrev=False)
    options.add_argument("--out", type=Path, metavar="FOLDER", help=f"({MEASURED}; of a rehearsal {REHEARSED})")
    names, only = [stage.name for stage in STAGES], "these stages, and what is there, alone"
    options.add_argument("--only", action="extend", nargs="+", choices=names, metavar="STAGE", help=only)
    options.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    arguments = options.parse_args(argv)
    out: Path = (arguments.out or (REHEARSED if arguments.rehearse else MEASURED)).resolve()
    try:
        (out / PARTS).mkdir(parents=True, exist_ok=True)
        mixed = [name for name, of in read(out).items() if of["machine"]["rehearsal"] != arguments.rehearse]
    except (OSError, ValueError) as error:
        options.error(f"--out: expected a folder for results, found {error}")
    if mixed:  # one report must not show both
        other = "measurements" if arguments.rehearse else "a rehearsal"
        options.error(f"--out: expected a folder without {other}, found {', '.join(mixed)} in {out}")
    check = Check(out, "cpu" if arguments.rehearse else "cuda")
    there = check.machine() or arguments.rehearse
    without = "" if there else NO_GPU
    for stage in STAGES:
        if arguments.only is None or stage.name in arguments.only:
            check.go(stage, "" if stage.name == "build" else without)
            if check.ended[-1].code == NO_KERNELS:
                without = "the extension has no kernels for this device"
    shutil.rmtree(out / PARTS)
    print(report(out))
    bad = [ended.name for ended in check.ended if ended.status in ("failed", "timeout")]
    print(f"{'failed: ' + ', '.join(bad) if bad else 'no stage failed'}; wrote {out}")
    for ended in check.ended:
        if ended.status == "skipped":
            print(f"skipped: {ended.name} ({ended.reason})")
    return 2 if not there else 1 if bad or without else 0


if __name__ == "__main__":
    raise SystemExit(main())
