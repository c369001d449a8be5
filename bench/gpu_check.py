"""Everything that needs a GPU, in one command and less than ten minutes: one archive of results, a report, a code.

    python -m bench.gpu_check [--out FOLDER] [--module FILE] [--only STAGE ...] [--rehearse]

docs/gpu.md says what it needs and how it goes on after faults and kills. Stages, with the seconds that each may take
besides what those before it left:

{stages}

The folder gets gpu_check.zip, with a JSON of each stage and the report, and report.md. ``--only`` runs some stages and
leaves the others' results. ``--rehearse`` runs every command on the CPU with tiny sizes, where numbers mean nothing,
and has a folder of its own. Exit code: 0 all well; 1 a stage failed; 2 there is no GPU (then only the build runs), or
the options are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_stages import (
    GIVEN,
    LATE,
    MACHINE,
    NO_KERNELS,
    PARTLY,
    STAGES,
    Stage,
    command,
    environment,
    find_tool,
    toolkit,
)
from bench.harness import ROOT, commit, markdown, place

_ABOUT = [f"    {stage.name:<12} {stage.seconds:>3}  {stage.about}" for stage in (MACHINE, *STAGES)]
__doc__ = (__doc__ or "").format(stages="\n".join(_ABOUT))
KEPT = 400_000  # characters of a stage's output, its end
REHEARSAL_PATIENCE = 4  # times the seconds of a stage, on a machine that other tests are running on
STARTING, GRACE = 0.75, 10.0  # of its time a stage that stops itself gets this share; what it may be late, seconds
TICK = 5.0  # seconds from one archive to the next
# Ends its group of processes when its input ends; first by SIGTERM, for ninja has compilers in groups of their own, and
# takes away what they have written a part of.
GUARD = ["sh", "-c", "trap '' TERM; read -r _; kill -TERM 0; sleep 0.5; kill -KILL 0"]
NO_GPU = "no GPU: torch.cuda.is_available() is false here"
MEASURED, REHEARSED = Path("gpu_check"), Path("gpu_check", "rehearsal")  # folders, if none is given
ARCHIVE, REPORT, OUT = "gpu_check.zip", "report.md", "results.json"
TOOLS = ("nvcc", "g++", "cmake", "ninja", "nvidia-smi", "compute-sanitizer")


@dataclasses.dataclass
class Ended:
    """A stage: passed, partly, failed, timeout or skipped; unfinished until then. ``machine``: where it was."""

    name: str
    status: str
    seconds: float = 0.0
    command: str = ""
    reason: str = ""
    output: str = ""
    code: int | None = None
    results: Any = None
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(
    name: str,
    line: Sequence[str],
    seconds: float,
    folder: Path,
    more: Mapping[str, str],
    tick: Callable[[Ended], object],
) -> Ended:
    """Run a command in the source tree; ``folder`` takes its output and its results, ``tick`` what there is so far.

    A process that dies of one of its questions is followed by another, as long as each has answered some. They and
    their children end when the time is over, and when this process does, killed or not: a shell whose input comes from
    here is of the same group.
    """
    start, out, log = time.monotonic(), folder / OUT, folder / "log"
    shown = " ".join([part if "\n" not in part else "..." for part in line])
    print(f"== {name}: {shown} (at most {seconds:.0f} s)", flush=True)

    def found(status: str, reason: str, code: int | None = None) -> Ended:
        text = log.read_text(encoding="utf-8", errors="replace")[-KEPT:]
        results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None
        return Ended(name, status, round(time.monotonic() - start, 1), shown, reason, text, code, results)

    codes, known = list[int | None](), -1
    with log.open("w") as output, subprocess.Popen(GUARD, stdin=subprocess.PIPE, process_group=0) as guard:
        while None not in codes and (answers := unended(out)) > known:
            known, code = answers, None
            process = subprocess.Popen(
                line,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(more),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=guard.pid,
            )
            while code is None and (left := start + max(1.0, seconds) - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=min(TICK, left))
                tick(found("unfinished", "the run ended within it"))
            codes.append(code)
    process.wait()
    code = next((code for code in codes if code not in (0, PARTLY)), codes[-1])
    late = re.findall(f"^{LATE}.*", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    ends = {None: ("timeout", f"more than {seconds:.0f} s"), 0: ("passed", ""), PARTLY: ("partly", "".join(late[-1:]))}
    return found(*ends.get(code, ("failed", f"exit code {code}")), code)


def unended(out: Path) -> int:
    """How many answers a process left that did not come to its end; -1 if it did."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"ended": False, "rows": []}
    return -1 if found["ended"] else len(found["rows"])


def read(folder: Path) -> dict[str, Ended]:
    """Reads the results of the stages that have ended, in the order of the stages."""
    if not (folder / ARCHIVE).is_file():
        return {}
    with zipfile.ZipFile(folder / ARCHIVE) as archive:
        there = archive.namelist()
        names = [stage.name for stage in (MACHINE, *STAGES) if f"{stage.name}.json" in there]
        return {name: Ended(**json.loads(archive.read(f"{name}.json"))) for name in names}


def report(results: Mapping[str, Ended]) -> str:
    """Makes Markdown of the results: the machine, a table of the stages, and the end of what each of them printed."""
    facts = results["machine"].machine  # other stages may be of an earlier run
    lines = ["# GPU check", ""]
    if facts["rehearsal"]:
        lines += ["A rehearsal on a CPU with tiny sizes: no number here means anything.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, ended in results.items():
        differing = [f"{key} {value}" for key, value in ended.machine.items() if facts.get(key) != value]
        lines += [f"- of an earlier run is {name}: {', '.join(differing)}"] if differing else []
    rows = ((name, ended.status, f"{ended.seconds:.0f}", ended.reason) for name, ended in results.items())
    lines += ["", markdown(("stage", "status", "s", "why"), rows)]
    for stage in STAGES:
        output = results[stage.name].output.splitlines()[-stage.shown :] if stage.name in results else []
        if output:
            lines += ["", f"## {stage.name}: {stage.about}", "", "````text", *output, "````"]
    return "\n".join(lines) + "\n"


class Check:
    """The stages one after another, and the archive that they are written to."""

    def __init__(self, out: Path, device: str, module: Path | None = None) -> None:
        self.out, self.device = out, device
        self.stages = STAGES if module is None else (GIVEN, *STAGES[1:])
        self.patience = REHEARSAL_PATIENCE if device == "cpu" else 1
        self.saved = 0.0  # seconds that the stages so far have left over
        self.home = toolkit() if device == "cuda" and module is None else None
        self.facts: dict[str, Any] = {"commit": commit(), "rehearsal": device == "cpu"}
        self.results = read(out)
        self.ended: list[Ended] = []
        if module is not None:
            shutil.copy(module, ROOT / "pyglow_fast" / module.name)

    def add(self, ended: Ended) -> None:
        """Report a stage, and make archive and report anew."""
        self.ended.append(ended)
        print(f"   {ended.status} after {ended.seconds:.0f} s {ended.reason}".rstrip(), flush=True)
        if ended.status in ("failed", "timeout"):
            print("\n".join(ended.output.splitlines()[-60:]), flush=True)
        ended.machine = self.facts
        self.results[ended.name] = ended
        self.save()

    def save(self, running: Ended | None = None) -> None:
        """Write both files: results, and what a stage has found so far, unless all it has are results of before."""
        results = dict(self.results)
        if running is not None:
            running.machine, before = self.facts, results.get(running.name)
            if running.results is not None or before is None or before.results is None:
                results[running.name] = running
        files = {f"{name}.json": json.dumps(dataclasses.asdict(found), indent=1) for name, found in results.items()}
        files["report.md"] = report(results)

        def write(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, text in files.items():
                    archive.writestr(name, text)

        place(self.out / REPORT, lambda path: path.write_text(files["report.md"], encoding="utf-8"))
        place(self.out / ARCHIVE, write)

    def machine(self) -> bool:
        """Look up what is there; tells whether there is a GPU, or may be one where that did not come to its end."""
        ended = self.run(MACHINE)
        with contextlib.suppress(ValueError, IndexError):
            self.facts |= json.loads(ended.output.splitlines()[-1])
        self.facts |= {tool: find_tool(tool, self.home) or "not found" for tool in TOOLS}
        self.add(ended)
        return "capability" in self.facts or ended.status != "passed"

    def run(self, stage: Stage) -> Ended:
        """Run a stage, or skip it for want of a program."""
        needs = stage.needs if self.device == "cuda" else ()
        absent = [f"{name} was not found" for name in needs if find_tool(name, self.home) is None]
        if stage.name == "build" and needs and self.home is None:
            absent.append("no CUDA toolkit with nvcc was found: --module takes what was built elsewhere")
        if absent:
            return Ended(stage.name, "skipped", reason=", ".join(absent))
        more = environment(stage, self.device, self.facts.get("capability", ""), self.home)
        limit = self.patience * stage.seconds + self.saved
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            until = time.monotonic() + max(STARTING * limit, limit - GRACE)  # to end takes a while
            line = command(stage, self.device, Path(folder, OUT), until)
            ended = run(stage.name, line, limit, Path(folder), more, self.save)
        self.saved = limit - ended.seconds
        if stage.name == "build" and ended.status == "timeout":
            ended.reason += "; what is compiled is kept: run it again"
        return ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are asked for, and write the report; 0, 1 or 2, as the module says."""
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser("bench gpu_check", description=__doc__, formatter_class=raw, allow_abbrev=False)
    options.add_argument("--out", type=Path, metavar="FOLDER", help=f"({MEASURED}; of a rehearsal {REHEARSED})")
    options.add_argument("--module", type=Path, metavar="FILE", help="a compiled _C*.so, in the place of a build")
    names, only = [stage.name for stage in STAGES], "these stages, and what is there, alone"
    options.add_argument("--only", action="extend", nargs="+", choices=names, metavar="STAGE", help=only)
    options.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    arguments = options.parse_args(argv)
    module: Path | None = arguments.module
    if module is not None and not (module.is_file() and module.match("_C*.so")):
        options.error(f"--module: expected a compiled _C*.so, found {str(module)!r}")
    out: Path = (arguments.out or (REHEARSED if arguments.rehearse else MEASURED)).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        mixed = [name for name, ended in read(out).items() if ended.machine["rehearsal"] != arguments.rehearse]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        options.error(f"--out: expected a folder for results, found {error}")
    if mixed:  # one report must not show both
        other = "measurements" if arguments.rehearse else "a rehearsal"
        options.error(f"--out: expected a folder without {other}, found {', '.join(mixed)} in {out}")
    check = Check(out, "cpu" if arguments.rehearse else "cuda", module)
    there = check.machine() or arguments.rehearse
    without = "" if there else NO_GPU
    for stage in check.stages:
        if arguments.only is None or stage.name in arguments.only:
            skipped = without and stage.name != "build"
            check.add(Ended(stage.name, "skipped", reason=without) if skipped else check.run(stage))
            if check.ended[-1].code == NO_KERNELS:
                without = "the extension has no kernels for this device"
    print(report(check.results))
    bad = [ended.name for ended in check.ended if ended.status in ("failed", "timeout")]
    print(f"{'failed: ' + ', '.join(bad) if bad else 'no stage failed'}; wrote {out}")
    print(*(f"{e.status}: {e.name} ({e.reason})" for e in check.ended if e.status in ("skipped", "partly")), sep="\n")
    return 2 if not there else 1 if bad or without else 0


if __name__ == "__main__":
    raise SystemExit(main())
