"""Runs the commands around a run: data, report, info."""

from __future__ import annotations

import argparse
from typing import Any

from pyglow_fast import info
from pyglow_fast._errors import expect
from pyglow_fast._files import write_text
from pyglow_fast.cli._arguments import Commands, command, output_path
from pyglow_fast.cli._output import InputError, say, say_next, user_input
from pyglow_fast.data import FETCHABLE, FetchError, data_folder, fetch
from pyglow_fast.data.sources import SHIPPED
from pyglow_fast.studio.opened import find_run
from pyglow_fast.train import page_of


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

    about = "print versions, what was built, and which backend each op uses"
    command(commands, show_info, about, "info")


def data(args: argparse.Namespace) -> None:
    """Fetch a data set, or list those that can be fetched."""
    with user_input():
        expect(args.to is None or args.name is not None, "to", "the name of a data set with it", "none")
        if args.name is None:
            say(_listing(), lines=True)
            return
        try:
            folder, was_there = fetch(args.name, args.to)
        except FetchError as error:
            raise InputError(str(error)) from error
    say(f"{args.name} {'was there and is whole' if was_there else 'fetched'}: {folder}")
    say(f"{FETCHABLE[args.name].licence} - {FETCHABLE[args.name].about}")
    name = args.name if args.to is None else f"{args.name}:{folder}"
    say_next("train", name, "--out", f"runs/{args.name}")


def _listing() -> str:
    lines = []
    for name, item in FETCHABLE.items():
        there = data_folder() / name
        state = f"in {there}" if there.is_dir() else "not fetched"
        lines.append(f"{name}: {item.about}\n  {item.size}, {item.licence}, from {item.origin}; {state}")
    return "\n".join([*lines, f"the cache is {data_folder()}; set PYGLOW_DATA to move it"])


def report(args: argparse.Namespace) -> None:
    """Write the page of a run, as training does at its end, at any time."""
    with user_input():
        folder, _ = find_run(args.run)
        own = args.out is None and folder.path != SHIPPED  # nothing is written into the package
        out = folder.page if own else output_path(args.out or "report.html", ".html", "out")
        folder.read_config()  # whatever else a page could lack is no error
    write_text(out, page_of(folder))
    say(out)


def show_info(args: argparse.Namespace) -> None:
    """Print the facts."""
    say(info.report(), lines=True)
