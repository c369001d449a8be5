"""Runs ``pyglow-fast sample``: writes a grid of images that the model draws."""

from __future__ import annotations

import argparse

from pyglow_fast.cli._common import (
    add_run,
    check_counts,
    number,
    open_to_look,
    picture_path,
    say,
    user_input,
    whole,
    write_made,
)
from pyglow_fast.studio.pictures import Grid
from pyglow_fast.studio.words import TEMPERATURE, Draw, N


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``sample`` and its options."""
    about = "draw images from a trained model"
    parser = commands.add_parser("sample", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--n", type=whole, metavar="N", default=N, help="images")
    parser.add_argument(
        "--temperature",
        type=number,
        metavar="X",
        default=TEMPERATURE,
        help="multiplies the priors' deviation; 0 is the mode",
    )
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="the same seed draws the same images")
    parser.add_argument(
        "--label", metavar="CLASS", action="append", help="a class; may be repeated (default: all classes in turn)"
    )
    parser.add_argument(
        "--columns",
        type=whole,
        metavar="N",
        help="images in a row (default: a column for each of up to 16 classes, else about a square)",
    )
    parser.add_argument(
        "--scale", type=whole, metavar="N", help="enlarge each pixel by this factor (default: to 64 pixels high)"
    )


def run(args: argparse.Namespace) -> int:
    """Draw the samples; returns the exit code."""
    with user_input():
        check_counts(args, "columns", "scale")
        plain = Draw(args.n, args.temperature, args.seed)
        opened = open_to_look(args)
        out = picture_path(args.out, opened.checkpoint.config.data.name)
        labels = tuple(opened.label(word) for word in args.label or ())
        draw = Draw(plain.n, plain.temperature, plain.seed, labels)
    grid = Grid(opened, draw)
    write_made(grid.made(args.columns, args.scale), out)
    bad = grid.drawn.not_finite
    note = f" ({bad} of them not finite, shown grey)" if bad else ""
    say(f"{args.n} samples at temperature {args.temperature:g}{note}: {out}")
    return 0
