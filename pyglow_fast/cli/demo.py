"""Runs ``pyglow-fast demo``: a Glow on handwritten digits in about two minutes, beside honest yardsticks."""

from __future__ import annotations

import argparse

from pyglow_fast.cli._common import folder_name, number, say, user_input, whole
from pyglow_fast.cli.train import finish, make_config
from pyglow_fast.train import start

# The settings are those of the digits' preset, with classes. All steps fit into two minutes on two cores.
DEMO = {"class_conditional": True, "max_steps": 1500, "eval_every": 250, "sample_every": 250, "sample_count": 80}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``demo`` and its options."""
    about = "train on handwritten digits for two minutes at most and show the result"
    parser = commands.add_parser("demo", help=about, description=about)
    parser.set_defaults(run_command=run)
    parser.add_argument("--out", type=folder_name, required=True, metavar="DIR", help="the folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in --out")
    parser.add_argument("--minutes", type=number, metavar="X", default=2.0, help="at most so long")
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="of everything random")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")


def run(args: argparse.Namespace) -> int:
    """Train and report; returns the exit code."""
    given = DEMO | {"max_minutes": args.minutes, "seed": args.seed, "device": args.device}
    with user_input():
        config, data = make_config(given, "digits")
        ready = start(config, args.out, args.overwrite, data)
    say(f"training on {len(ready.state.train)} handwritten digits; {len(ready.state.held_out)} are held out")
    return finish(ready.execute(), ready.folder)
