"""Runs ``pyglow-fast data``: fetches a data set, or lists those that can be fetched."""

from __future__ import annotations

import argparse

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import InputError, folder_name, say, user_input
from pyglow_fast.data import FETCHABLE, FetchError, data_folder, fetch


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``data`` and its options."""
    about = "fetch a data set into the cache, or list those that can be fetched"
    parser = commands.add_parser("data", help=about, description=about)
    parser.set_defaults(run_command=run)
    parser.add_argument("name", metavar="NAME", nargs="?", help=f"{', '.join(FETCHABLE)}; none: list them")
    parser.add_argument(
        "--to", type=folder_name, metavar="DIR", help="the folder for its files (default: one in the cache)"
    )


def listing() -> str:
    """Describe the data sets, each in a paragraph."""
    lines = []
    for name, item in FETCHABLE.items():
        there = data_folder() / name
        state = f"in {there}" if there.is_dir() else "not fetched"
        sources = " or ".join(str(origin) for origin in item.origins)
        lines.append(f"{name}: {item.about}\n  {item.size}, {item.licence}, from {sources}; {state}")
    lines.append(f"the cache is {data_folder()}; set PYGLOW_DATA to move it")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Fetch or list; returns the exit code."""
    with user_input():
        expect(args.to is None or args.name is not None, "to", "the name of a data set with it", "none")
        if args.name is None:
            say(listing(), lines=True)
            return 0
        try:
            folder, was_there = fetch(args.name, args.to)
        except FetchError as error:
            raise InputError(str(error)) from error
    say(f"{args.name} {'was there and is whole' if was_there else 'fetched'}: {folder}")
    say(f"{FETCHABLE[args.name].licence} - {FETCHABLE[args.name].about}")
    return 0
