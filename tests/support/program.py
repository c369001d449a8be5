"""The command ``pyglow-fast`` in this process, as its users see it: words in; an exit code, words and files out."""

from __future__ import annotations

import contextlib
import csv
import io
import runpy
import sys
import warnings
from pathlib import Path
from typing import NamedTuple


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


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by the names of its columns."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def untimed(run: Path) -> list[dict[str, str]]:
    """The metrics of a run, apart from what the clock says."""
    timed = ("seconds", "images_per_s", "memory_mb")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows(run / "metrics.csv")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files and folders below a folder, but what commands computed of a run (``cache``): names and bytes."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    kept = {name: path for name, path in found.items() if "cache" not in name.parts}
    return {str(name): path.read_bytes() if path.is_file() else b"" for name, path in kept.items()}
