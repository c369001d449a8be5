"""Runs ``pyglow-fast temperatures``: draws images from the same noise at several temperatures."""

from __future__ import annotations

import argparse

import torch

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import add_run, number, open_to_look, picture_path, say, stream, user_input, whole
from pyglow_fast.cli._latents import add_picture, check_options, save
from pyglow_fast.latents import temperature_sweep
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.studio.words import Draw
from pyglow_fast.train import device_of

TEMPERATURES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``temperatures`` and its options."""
    about = "samples at several temperatures, a row each, from the same noise"
    parser = commands.add_parser("temperatures", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    parser.add_argument(
        "--temperatures",
        type=number,
        nargs="+",
        metavar="T",
        default=list(TEMPERATURES),
        help="what multiplies the deviation of the priors",
    )
    parser.add_argument("--n", type=whole, metavar="N", default=8, help="samples of each")
    parser.add_argument(
        "--label", metavar="CLASS", action="append", help="a class; may be repeated (default: all classes in turn)"
    )
    add_picture(parser, "the noise")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Draw the samples; returns the exit code."""
    with user_input():
        check_options(args, "n")
        for value in args.temperatures:
            expect(0.0 <= value < float("inf"), "temperatures", "numbers, 0 or more", value)
        out = picture_path(args.out)
        opened = open_to_look(args)
        draw = Draw(args.n, labels=tuple(opened.label(name) for name in args.label or ()))
        model, n_bins = opened.model, opened.n_bins
        y, device = opened.labels_of(draw), device_of(model)
    sweep = temperature_sweep(model, args.temperatures, args.n, y, generator=stream(device, args.seed))
    columns = [] if y is None else [opened.classes[label] for label in y.tolist()]
    rows = [(f"T = {value:g}", x) for value, x in zip(args.temperatures, sweep, strict=True)]
    title = f"{args.run}: samples of the same noise"
    save(out, rows, n_bins, columns, title, args.scale)
    bad = {f"{value:g}": count_not_finite(x) for value, x in zip(args.temperatures, sweep, strict=True)}
    counts = ", ".join(f"{count} at {value}" for value, count in bad.items() if count)
    note = f"not finite, shown grey: {counts}" if counts else "all finite"
    say(f"{args.n} samples at each of {len(args.temperatures)} temperatures, {note}: {out}")
    return 0
