"""Runs the commands around a run: data, report, bench, info."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from pyglow_fast import info
from pyglow_fast._errors import expect
from pyglow_fast.cli._arguments import Commands, command, is_shown, output_path, shown_run
from pyglow_fast.cli._output import InputError, say, say_next, user_input
from pyglow_fast.data import FETCHABLE, FetchError, data_folder, fetch
from pyglow_fast.train import RunFolder, page_of
from pyglow_fast.train.files import write_text


def add(commands: Commands[Any]) -> None:
    """Declare the commands and their options."""
    about = "fetch a data set into the cache, or list those that can be fetched"
    parser = command(commands, data, about, "data fashion-mnist")
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"{', '.join(FETCHABLE)}; none: list them")
    text = "the folder for its files (default: one in the cache)"
    parser.add_argument("--to", metavar="DIR", help=text)

    about = "write one HTML page of a run, at its end or not: scores, curves, samples, settings"
    parser = command(commands, report, about, "report runs/demo", "run")
    parser.add_argument(
        "--out", metavar="HTML", help="where the page goes (default: RUN/report.html, as after training)"
    )

    about = "run a benchmark of the source tree: models, kernels, memory, ..."
    parser = command(commands, bench, about, "bench kernels")
    parser.add_argument("name", metavar="NAME", help="such as kernels; --help after it lists its options")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the options of that benchmark")

    about = "print versions, what was built, and which backend each op uses"
    command(commands, show_info, about, "info")


def data(args: argparse.Namespace) -> int:
    """Fetch a data set, or list those that can be fetched; returns the exit code."""
    with user_input():
        expect(args.to is None or args.name is not None, "to", "the name of a data set with it", "none")
        if args.name is None:
            say(_listing(), lines=True)
            return 0
        try:
            folder, was_there = fetch(args.name, args.to)
        except FetchError as error:
            raise InputError(str(error)) from error
    say(f"{args.name} {'was there and is whole' if was_there else 'fetched'}: {folder}")
    say(f"{FETCHABLE[args.name].licence} - {FETCHABLE[args.name].about}")
    name = args.name if args.to is None else f"{args.name}:{folder}"
    say_next("train", name, "--out", f"runs/{args.name}")
    return 0


def _listing() -> str:
    """The data sets, each in a paragraph."""
    lines = []
    for name, item in FETCHABLE.items():
        there = data_folder() / name
        state = f"in {there}" if there.is_dir() else "not fetched"
        lines.append(f"{name}: {item.about}\n  {item.size}, {item.licence}, from {item.origin}; {state}")
    return "\n".join([*lines, f"the cache is {data_folder()}; set PYGLOW_DATA to move it"])


def report(args: argparse.Namespace) -> int:
    """Write the page of a run, as training does at its end, at any time; returns the exit code."""
    with user_input():
        ours = is_shown(args.run)
        folder = RunFolder(shown_run() if ours else args.run)
        given = args.out or ("report.html" if ours else None)  # nothing is written into the package
        out = folder.page if given is None else output_path(given, ".html", "out")
        folder.read_config()  # whatever else a page could lack is no error
    write_text(out, page_of(folder))
    say(out)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Run a benchmark, which is not part of the installed package; returns its exit code."""
    places = (Path(__file__).resolve().parents[2], Path.cwd())  # a checkout, also installed with -e; or the current one
    root = next((place for place in places if (place / "bench" / "harness.py").is_file()), None)
    if root is None:
        raise InputError(
            "bench: expected to run from a source tree of pyglow_fast, found an installed package alone; "
            "the benchmarks are not part of it: clone the repository and run this command in it"
        )
    names = sorted(path.stem for path in (root / "bench").glob("*.py") if "\ndef main(" in path.read_text("utf-8"))
    with user_input():
        expect(args.name in names, "name", f"one of {', '.join(names)}", repr(args.name))
    sys.path.insert(0, str(root))
    try:
        code: int = importlib.import_module(f"bench.{args.name}").main(args.options)
    except SystemExit as stop:  # its own parser printed the help or an error
        return stop.code if isinstance(stop.code, int) else 2
    finally:
        sys.path.remove(str(root))
    return code


def show_info(args: argparse.Namespace) -> int:
    """Print the facts; returns the exit code."""
    say(info.report(), lines=True)
    return 0
