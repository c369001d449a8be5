"""Runs ``pyglow-fast bench``: the benchmarks of the source tree, which are not part of the installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyglow_fast.cli._common import InputError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``bench`` and its options."""
    about = "the benchmarks of the source tree: models, kernels, memory, ..."
    parser = commands.add_parser("bench", help=about, description=about)
    parser.set_defaults(run_command=run)
    parser.add_argument("name", metavar="NAME", help="such as kernels; --help after it lists its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the options of that benchmark")


def source_tree() -> Path:
    """Find the folder that has bench/: above the package in a checkout (also installed with -e), or the current one.

    Raises:
        InputError: neither is a source tree of this project.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "bench" / "harness.py").is_file() and (root / "csrc" / "core.h").is_file():
            return root
    raise InputError(
        "bench: expected to run from a source tree of pyglow_fast, found an installed package alone; "
        "the benchmarks are not part of it: clone the repository and run this command in it"
    )


def names(root: Path) -> list[str]:
    """List the benchmarks there: modules of bench/ with a ``main``."""
    return sorted(path.stem for path in (root / "bench").glob("*.py") if "\ndef main(" in path.read_text("utf-8"))


@contextmanager
def _importable(root: Path) -> Iterator[None]:
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; returns its exit code."""
    root = source_tree()
    if args.name not in names(root):
        raise InputError(f"name: expected one of {', '.join(names(root))}, found {args.name!r}")
    with _importable(root):
        module = importlib.import_module(f"bench.{args.name}")
        try:
            code: int = module.main(args.options)
        except SystemExit as stop:  # its own parser printed the help or an error
            return stop.code if isinstance(stop.code, int) else 2
    return code
