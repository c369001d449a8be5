"""Puts the faults of faults.toml, one at a time, into a copy of the sources and shows which tests catch them.

    python tests/faults.py [--minutes 60] [--only WORD]

Faults in csrc/cuda are run by the emulator, all others are compiled into the copy's own extension. The exit code is 1
if the tests miss a fault; faults that the time does not suffice for are counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "faults"
BUILD = ["setup.py", "build_ext", "--inplace"]
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
COMPILED, EMULATED = ["tests/kernels"], ["--full", "-k", "emul", "tests/kernels", "tests/emulation"]
BUILD_SECONDS, TEST_SECONDS = 1200, 900  # tests that take longer have not caught the fault
TIME_LIMIT = 124
BROKEN_RUN = (2, 3, 4, 5)  # pytest could not import a test, failed itself, got wrong arguments, found no test


@dataclass(frozen=True)
class Fault:
    """In ``file`` the text ``old``, which stands there once (tests/test_architecture.py), becomes ``new``."""

    file: str
    old: str
    new: str
    breaks: str

    def seed(self, root: Path) -> None:
        """Put the fault into its file."""
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


def load() -> list[Fault]:
    """Read the list."""
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    return [Fault(**entry) for entry in tomllib.loads(text)["fault"]]


def run(arguments: list[str], seconds: float) -> tuple[int, str]:
    """Run Python in the copy; return the exit code and the output."""
    environment = {**os.environ, "PYTHONPATH": str(COPY), "PYGLOW_CUDA": "0"}
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, cwd=COPY, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return TIME_LIMIT, ""
    return done.returncode, done.stdout + done.stderr


def make_copy() -> None:
    """Copy the sources and compile them, so that of a fault only what it touches is compiled."""
    shutil.rmtree(COPY, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, COPY / name)
    code, output = run(BUILD, BUILD_SECONDS)
    if code != 0:
        raise RuntimeError(f"the sources without a fault do not compile:\n{output[-3000:]}")


def judge(fault: Fault) -> str:
    """Name the first test that fails with the fault; the text is empty if all tests pass."""
    fault.seed(COPY)
    is_emulated = fault.file.startswith("csrc/cuda/")
    try:
        if not is_emulated and run(BUILD, BUILD_SECONDS)[0] != 0:
            return "the compiler"
        code, output = run([*PYTEST, *(EMULATED if is_emulated else COMPILED)], TEST_SECONDS)
    finally:
        shutil.copyfile(ROOT / fault.file, COPY / fault.file)
    if code in BROKEN_RUN:
        raise RuntimeError(f"exit code {code}\n{output[-2000:]}")
    failed = [line.split(" - ")[0] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "" if code in (0, TIME_LIMIT) else (failed or [f"exit code {code}"])[0]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--minutes", type=float, default=60, help="no fault is begun after this time")
    parser.add_argument("--only", default="", metavar="WORD", help="a part of the file's name or of what breaks")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    faults = [fault for fault in load() if options.only in fault.file or options.only in fault.breaks]
    make_copy()
    verdicts = []
    for fault in faults:
        if time.monotonic() > end:
            break
        verdicts.append(judge(fault))
        print(f"{'caught' if verdicts[-1] else 'MISSED'}  {fault.file}: {fault.breaks} {verdicts[-1]}", flush=True)
    missed = verdicts.count("")
    print(f"{len(verdicts) - missed} caught, {missed} missed, {len(faults) - len(verdicts)} not begun in time")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
