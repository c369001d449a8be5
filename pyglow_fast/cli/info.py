"""Runs ``pyglow-fast info``: prints versions, what was built, and which backend runs what."""

from __future__ import annotations

import argparse

from pyglow_fast import info
from pyglow_fast.cli._common import say


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``info`` and its options."""
    about = "versions, what was built, and which backend each op uses"
    parser = commands.add_parser("info", help=about, description=about)
    parser.set_defaults(run_command=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts; returns the exit code."""
    say(info.report(), lines=True)
    return 0
