"""Runs ``pyglow-fast report``: writes the page of a run, as training does at its end, at any time."""

from __future__ import annotations

import argparse

from pyglow_fast.cli._common import folder_name, output_path, say, user_input
from pyglow_fast.train import RunFolder, page_of
from pyglow_fast.train.files import write_text


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``report`` and its options."""
    about = "one HTML page of a run, at its end or not: scores, curves, samples, settings"
    parser = commands.add_parser("report", help=about, description=about)
    parser.set_defaults(run_command=run)
    parser.add_argument("run", type=folder_name, metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", required=True, metavar="HTML", help="where the page goes")


def run(args: argparse.Namespace) -> int:
    """Write the page; returns the exit code."""
    folder = RunFolder(args.run)
    with user_input():
        out = output_path(args.out, ".html")
        folder.read_config()  # whatever else a page could lack is no error
    write_text(out, page_of(folder))
    say(out)
    return 0
