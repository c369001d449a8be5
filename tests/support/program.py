"""The command ``pyglow-fast`` in this process, as its users see it: words in; an exit code, words and files out."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from support import ROOT


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote to stdout and to stderr."""

    code: int
    out: str
    err: str


def pyglow_fast(*words: object) -> Ended:
    """Run ``python -m pyglow_fast WORDS``. An exception that it lets through is the caller's: users get a traceback."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["pyglow-fast", *map(str, words)]
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("default")
            runpy.run_module("pyglow_fast", run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return Ended(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


def done(*words: object) -> str:
    """Run a command that is to succeed, and return what it wrote to stdout."""
    ended = pyglow_fast(*words)
    assert ended.code == 0, ended
    return ended.out


def expect_passed(*arguments: str, **environment: str) -> None:
    """pytest with these arguments passes some test and fails none, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    found = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert " passed" in found.stdout


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def untimed(run: Path) -> list[dict[str, str]]:
    """The metrics of a run, apart from what the clock says."""
    timed = ("seconds", "images_per_s")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows(run / "metrics.csv")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files and folders below a folder, but what commands computed of a run (``cache``): names and bytes."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    kept = {name: path for name, path in found.items() if "cache" not in name.parts}
    return {str(name): path.read_bytes() if path.is_file() else b"" for name, path in kept.items()}
