"""Seeds the faults of this folder, one at a time, into a scratch copy, and shows which tests catch them.

    python tests/mutations/run.py [--jobs 2] [--only NAME ...] [--area AREA ...] [--again]

For each fault: the tests that its entry names first; if they pass, the fast suite; if that passes too, the full one.
What the full suite alone catches is a hole in the fast one, what nothing catches is a hole in both: either ends the
program with exit code 1. As the fast suite runs a part of the full one's cases, what it catches both do.

Faults in csrc/cpu, csrc/math and csrc/bindings are compiled into the copy's own extension (without CUDA), those in
csrc/cuda are seen by the tests under tests/emulation, which compile the kernels themselves. Verdicts are kept in
build/mutants/results.json; a fault is judged anew if its text changed or with --again (after the tests changed, say).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRATCH = ROOT / "build" / "mutants"
RESULTS = SCRATCH / "results.json"
BUILD_SECONDS, FIRST_SECONDS, SUITE_SECONDS = 900, 300, 2400
CAUGHT = ("first", "fast", "build")  # verdicts that the fast suite is good for
# Exit codes: of pytest, where 2 is a module that cannot be imported; of a program that took too long.
PASSED, FAILED, INTERRUPTED, NO_TESTS, TIMEOUT = 0, 1, 2, 5, 124


@dataclass(frozen=True)
class Mutant:
    """One fault: in ``file`` the text ``old``, which stands there once, becomes ``new``."""

    name: str
    area: str
    file: str
    old: str
    new: str
    breaks: str
    first: list[str]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\0".join([self.file, self.old, self.new]).encode()).hexdigest()[:16]

    @property
    def is_compiled(self) -> bool:
        """True if the extension on a CPU has it compiled in."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")

    def applied(self, text: str) -> str:
        """The file with the fault in it."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r}: expected once in {self.file}, found {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


def load() -> list[Mutant]:
    """The faults of every file here, each in a table ``[[mutant]]``."""
    found: list[Mutant] = []
    for path in sorted(HERE.glob("*.toml")):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        found += [Mutant(**entry) for entry in tables.pop("mutant")]
        if tables:
            raise ValueError(f"{path.name}: expected tables named mutant, found {', '.join(sorted(tables))}")
    return found


@dataclass
class Verdict:
    """Who caught a fault: the tests named first, the fast suite, the build, only the full suite, or nobody."""

    name: str
    area: str
    file: str
    by: str
    test: str
    seconds: float
    digest: str


class Copy:
    """A copy of the source tree, for one fault after another."""

    def __init__(self, number: int) -> None:
        self.place = SCRATCH / f"copy{number}"
        self.log = SCRATCH / f"copy{number}.log"
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        for name in names:
            source, target = ROOT / name, self.place / name
            if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)  # with a new time, so that it is compiled again
        for stale in (self.place / "csrc").rglob("*.*"):  # of a former tree: every source in a folder is compiled
            if stale.is_file() and stale.relative_to(self.place).as_posix() not in names:
                stale.unlink()
        self.built = next((ROOT / "pyglow_fast").glob("_C*.so"))
        self.module = self.place / "pyglow_fast" / self.built.name
        self._restore_module()
        self.environment = {**os.environ, "PYTHONPATH": str(self.place), "PYGLOW_CUDA": "0", "MAX_JOBS": "2"}

    def _restore_module(self) -> None:
        self.module.unlink(missing_ok=True)  # the former may be mapped by a process that is still ending
        shutil.copyfile(self.built, self.module)

    def run(self, command: list[str], seconds: float) -> tuple[int, str]:
        """Exit code and output."""
        try:
            done = subprocess.run(
                command,
                cwd=self.place,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return TIMEOUT, str(error)
        return done.returncode, done.stdout

    def build(self) -> bool:
        """Compile what changed; false if it does not compile."""
        code, output = self.run([sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_SECONDS)
        if code != 0:
            self.log.write_text(output, encoding="utf-8")
        return code == 0

    def tests(self, arguments: list[str], seconds: float) -> str:
        """The first test that fails, or nothing."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        code, output = self.run(command, seconds)
        if code in (PASSED, NO_TESTS):
            return ""
        if 0 < code < 128 and code not in (FAILED, INTERRUPTED, TIMEOUT):
            raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{output[-2000:]}")
        self.log.write_text(output, encoding="utf-8")
        failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0] if failed else f"exit code {code}"

    def judge(self, mutant: Mutant) -> Verdict:
        """Seed a fault, test, and put back what was there."""
        start = time.monotonic()
        path = self.place / mutant.file
        whole = path.read_text(encoding="utf-8")
        path.write_text(mutant.applied(whole), encoding="utf-8")
        try:
            by, test = self._judge(mutant)
        finally:
            path.write_text(whole, encoding="utf-8")
            if mutant.is_compiled:
                self._restore_module()
        seconds = round(time.monotonic() - start, 1)
        return Verdict(mutant.name, mutant.area, mutant.file, by, test, seconds, mutant.digest)

    def _judge(self, mutant: Mutant) -> tuple[str, str]:
        if mutant.is_compiled and not self.build():
            return "build", "does not compile"
        stages = {
            "first": (mutant.first, FIRST_SECONDS),
            "fast": (["tests"], SUITE_SECONDS),
            "full": (["--full", "tests"], SUITE_SECONDS),
        }
        for by, (arguments, seconds) in stages.items():
            failed = self.tests(arguments, seconds)
            if failed:
                return by, failed
        return "nobody", ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree that are tested side by side")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="names of faults")
    parser.add_argument("--area", nargs="+", default=[], metavar="AREA")
    parser.add_argument("--again", action="store_true", help="judge also those that have a verdict")
    options = parser.parse_args(arguments)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    mutants = [
        mutant
        for mutant in load()
        if (not options.only or mutant.name in options.only) and (not options.area or mutant.area in options.area)
    ]
    known = {entry["name"]: Verdict(**entry) for entry in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    todo: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        verdict = known.get(mutant.name)
        if options.again or verdict is None or verdict.digest != mutant.digest:
            known.pop(mutant.name, None)
            todo.put(mutant)
    lock = threading.Lock()

    def work(number: int) -> None:
        copy = Copy(number)
        while not todo.empty():
            try:
                verdict = copy.judge(todo.get_nowait())
            except queue.Empty:
                return
            with lock:
                known[verdict.name] = verdict
                RESULTS.write_text(json.dumps([asdict(entry) for entry in known.values()], indent=1), encoding="utf-8")
                print(f"{verdict.by:7} {verdict.seconds:6.1f} s  {verdict.name}: {verdict.test}", flush=True)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(options.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    verdicts = [known[mutant.name] for mutant in mutants if mutant.name in known]
    for area in sorted({verdict.area for verdict in verdicts}):
        found = [verdict.by for verdict in verdicts if verdict.area == area]
        print(f"{area:12} {len(found):4} faults, {sum(by in CAUGHT for by in found):4} caught by the fast suite")
    holes = [verdict for verdict in verdicts if verdict.by not in CAUGHT]
    for verdict in holes:
        print(f"hole: {verdict.name} ({verdict.file}) is caught by {verdict.by}")
    print(f"{len(verdicts)} faults, {len(verdicts) - len(holes)} caught by the fast suite, {len(holes)} holes")
    return int(bool(holes) or len(verdicts) < len(mutants))


if __name__ == "__main__":
    raise SystemExit(main())
