"""Everything that needs a GPU, in one command and less than ten minutes: a report, a JSON of each stage, an exit code.

    python -m bench.gpu_check [--out FOLDER] [--only STAGE ...] [--rehearse]

Needs a source tree, Python 3.11 or newer with torch built for CUDA, numpy, safetensors and pytest, nvcc, a C++ compiler
and cmake; nothing is downloaded and nothing is installed: the extension is compiled into the tree. What else is missing
(compute-sanitizer, a peer's library, matplotlib) is skipped by name. Stages, in this order, with the seconds that each
may take besides what those before it have left over:

{stages}

A stage writes STAGE.json into the folder as it ends, and report.md, all of it in tables, is made anew: a run that is
killed leaves what had ended, and what the stage that it was at had written, in parts/. ``--only`` runs some stages
alone and leaves the others' files. ``--rehearse`` runs every command on the CPU with tiny sizes, where numbers mean
nothing, and has a folder of its own. Exit code: 0 all well; 1 a stage failed or ran out of time; 2 there is no GPU
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

from bench import gpu_report
from bench.gpu_stages import MACHINE_SECONDS, NO_KERNELS, STAGES, Stage, command, environment, find_tool, missing_tools
from bench.gpu_tests import read_tally
from bench.harness import ROOT, commit

_ABOUT = [f"    {stage.name:<12} {stage.budget:>3}  {stage.about}" for stage in STAGES]
__doc__ = (__doc__ or "").format(
    stages="\n".join([f"    {'machine':<12} {MACHINE_SECONDS:>3}  what is there", *_ABOUT])
)
TAIL = 6000  # characters of output that are kept of a stage
REHEARSAL_PATIENCE = 4  # times the budgets, on a machine that other tests are running on
LEAST_SECONDS = 5  # with less left a stage does not begin
NO_GPU = "no GPU: torch.cuda.is_available() is false here"
NO_TIME = "no time is left"
PARTS = "parts"  # what stages write while they run
MEASURED, REHEARSED = Path("gpu_check"), Path("gpu_check", "rehearsal")  # folders, if none is given
TOOLS = ("nvcc", "g++", "cmake", "ninja", "nvidia-smi", "compute-sanitizer")
WHAT_TO_DO = {"cmake": "pip install cmake, 3.24 or newer", "nvcc": "install the CUDA toolkit, or set CUDA_HOME"}
# The device as the tests and the benchmarks will see it, printed as JSON by another process, since torch keeps it open.
PROBE = """
import importlib.metadata, json, sys, torch
found = {"python": sys.version.split()[0], "torch": torch.__version__, "torch_cuda": str(torch.version.cuda)}
for name in ("numpy", "safetensors", "pytest", "setuptools"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = "not found"
if torch.cuda.is_available():
    facts = torch.cuda.get_device_properties(0)
    found |= {"device": facts.name, "capability": f"{facts.major}.{facts.minor}", "memory": facts.total_memory}
    found |= {"multiprocessors": facts.multi_processor_count, "L2": facts.L2_cache_size}
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
    tail: str = ""
    code: int | None = None
    results: Any = None


def _end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however that does (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def run(
    name: str, line: Sequence[str], seconds: float, log: Path, more: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> Ended:
    """Run a command in the source tree; it and its children end when the time is over. ``log`` takes its output."""
    start = time.monotonic()
    shown = " ".join([part if "\n" not in part else "..." for part in line])
    print(f"== {name}: {shown} (at most {seconds:.0f} s)", flush=True)
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        try:
            process = subprocess.Popen(
                line,
                cwd=cwd,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(more or {}),
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
        tail = output.read()[-TAIL:]
    return Ended(name, status, round(time.monotonic() - start, 1), shown, reason, tail, code)


def read_results(folder: Path) -> Any:
    """Reads what a stage has written: its JSON, a list of several, or a tally of tests; None if nothing."""
    found: list[Any] = []
    for path in sorted(folder.glob("*.json*")):
        with contextlib.suppress(ValueError, OSError):
            found.append(read_tally(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8")))
    return found[0] if len(found) == 1 else found or None


class Check:
    """The stages one after another, and the folder that they are written to."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.patience = REHEARSAL_PATIENCE if device == "cpu" else 1
        self.saved = 0.0  # seconds that the stages so far have left over
        self.facts: dict[str, Any] = {"commit": commit(), "rehearsal": device == "cpu"}
        self.ended: list[Ended] = []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, ended: Ended) -> Ended:
        """Report a stage, write its file, and make the report anew."""
        self.ended.append(ended)
        print(f"   {ended.status} after {ended.seconds:.0f} s {ended.reason}".rstrip(), flush=True)
        if ended.status in ("failed", "timeout"):
            print(ended.tail, flush=True)
        content = {"machine": self.facts, **dataclasses.asdict(ended)}
        _write(self.out / f"{ended.name}.json", json.dumps(content, indent=1) + "\n")
        _write(self.out / "report.md", gpu_report.report(self.out))
        return ended

    def skip(self, name: str, reason: str) -> Ended:
        """Add a stage that does not run, with the reason."""
        print(f"== {name}", flush=True)
        return self.add(Ended(name, "skipped", reason=reason))

    def go(self, stage: Stage) -> Ended:
        """Run a stage and add it, or skip it where a program that it needs is missing or no time is left."""
        missing = missing_tools(stage, self.device)
        if missing:
            said = [
                f"{name} was not found" + (f" ({WHAT_TO_DO[name]})" if name in WHAT_TO_DO else "") for name in missing
            ]
            return self.skip(stage.name, ", ".join(said))
        if self.patience * stage.budget + self.saved < LEAST_SECONDS:
            return self.skip(stage.name, NO_TIME)
        folder = self.out / PARTS / stage.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        line = command(stage, self.device, folder)
        more = environment(stage, self.device, self.facts.get("capability", ""))
        ended = self._timed(stage.name, line, stage.budget, folder, more)
        if stage.name == "build" and ended.status == "timeout":
            ended.reason += "; what is compiled is kept: run it again"
        self.add(ended)
        shutil.rmtree(folder)
        return ended

    def _timed(self, name: str, line: Sequence[str], budget: float, folder: Path, more: Mapping[str, str]) -> Ended:
        seconds = self.patience * budget + self.saved
        ended = run(name, line, seconds, folder / "log", more)
        ended.results = read_results(folder)
        self.saved = seconds - ended.seconds
        return ended

    def machine(self) -> bool:
        """Look up what is there; tells whether there is a GPU."""
        folder = self.out / PARTS
        folder.mkdir(parents=True, exist_ok=True)
        ended = self._timed("machine", [sys.executable, "-c", PROBE], MACHINE_SECONDS, folder, {})
        with contextlib.suppress(ValueError, IndexError):
            self.facts |= json.loads(ended.tail.splitlines()[-1])
        self.facts |= {tool: find_tool(tool) or "not found" for tool in TOOLS}
        smi = find_tool("nvidia-smi")
        if smi is not None:
            asked = [smi, "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.facts["nvidia-smi"] = subprocess.run(
                    asked, capture_output=True, text=True, timeout=10
                ).stdout.strip()
        self.add(ended)
        return "capability" in self.facts


def unfit(out: Path, rehearsal: bool) -> str:
    """Why a run is not to write into a folder, or nothing; the folder is made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        earlier = gpu_report.read(out)
    except (OSError, ValueError) as error:
        return f"expected a folder for results, found {error}"
    if not os.access(out, os.W_OK):
        return f"expected a folder that can be written to, found {out}"
    others = [name for name, content in earlier.items() if content["machine"]["rehearsal"] != rehearsal]
    other = "measurements" if rehearsal else "a rehearsal"  # one report must not show both
    return f"expected a folder without {other}, found {', '.join(others)} in {out}" if others else ""


def _write(path: Path, text: str) -> None:
    """Put a file in its place whole: a kill leaves the one before or this one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(prog="bench gpu_check", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    folders = f"({MEASURED}; of a rehearsal {REHEARSED})"
    options.add_argument("--out", type=Path, metavar="FOLDER", help=folders)
    options.add_argument(
        "--only",
        action="extend",
        nargs="+",
        choices=[stage.name for stage in STAGES],
        metavar="STAGE",
        help="these stages, and what is there, alone",
    )
    options.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for, and write the report.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0, 1 or 2, as the module says.
    """
    options = parser()
    arguments = options.parse_args(argv)
    out = (arguments.out or (REHEARSED if arguments.rehearse else MEASURED)).resolve()
    problem = unfit(out, arguments.rehearse)
    if problem:
        options.error(f"--out: {problem}")
    check = Check(out, "cpu" if arguments.rehearse else "cuda")
    chosen = [stage for stage in STAGES if arguments.only is None or stage.name in arguments.only]
    there = check.machine() or arguments.rehearse
    without = "" if there else NO_GPU
    for stage in chosen:
        if without and stage.name != "build":
            check.skip(stage.name, without)
            continue
        ended = check.go(stage)
        if ended.code == NO_KERNELS:
            without = "the extension has no kernels for this device"
    bad = [ended.name for ended in check.ended if ended.status in ("failed", "timeout")]
    skipped: dict[str, list[str]] = {}
    for ended in check.ended:
        if ended.status == "skipped":
            skipped.setdefault(ended.reason, []).append(ended.name)
    shutil.rmtree(check.out / PARTS)
    print(gpu_report.report(check.out))
    print(f"{'failed: ' + ', '.join(bad) if bad else 'no stage failed'}; wrote {check.out}")
    if skipped:
        print("skipped: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in skipped.items()))
    if not there:
        return 2
    late = any(ended.reason == NO_TIME for ended in check.ended)
    return 1 if bad or late or without else 0


if __name__ == "__main__":
    raise SystemExit(main())
