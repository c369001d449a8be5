"""``pyglow-fast sample``: a grid of images that the model draws."""

from __future__ import annotations

import argparse

import torch

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import add_run, number, open_run, picture_path, stream, user_input, whole
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.train import Checkpoint, class_columns, class_cycle, save_grid, to_levels

BATCH = 64


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    about = "draw images from a trained model"
    parser = commands.add_parser("sample", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument("--n", type=whole, metavar="N", default=64, help="images (64)")
    parser.add_argument(
        "--temperature", type=number, metavar="X", default=0.7, help="multiplies the priors' deviation; 0 is the mode"
    )
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="the same seed draws the same images (0)")
    parser.add_argument(
        "--label", metavar="CLASS", action="append", help="a class; may be repeated (default: all classes in turn)"
    )
    parser.add_argument("--columns", type=whole, metavar="N", help="images in a row")
    parser.add_argument(
        "--scale", type=whole, metavar="N", help="enlarge each pixel by this factor (default: to 64 pixels high)"
    )


def labels_of(names: list[str] | None, n: int, checkpoint: Checkpoint, device: torch.device) -> torch.Tensor | None:
    """The label of each of n samples, or None for a model without classes.

    Raises:
        ValueError: a class that the model does not know.
    """
    classes = checkpoint.data.class_names
    n_classes = checkpoint.config.model.n_classes
    if names is None:
        return class_cycle(n, n_classes, device)
    expect(n_classes is not None, "label", "no label, since the model has no classes", names[0])
    for name in names:
        expect(name in classes, "label", f"one of {', '.join(classes)}", repr(name))
    chosen = torch.tensor([classes.index(name) for name in names], device=device)
    return chosen[torch.arange(n, device=device) % len(chosen)]


def run(args: argparse.Namespace) -> int:
    """Sample; returns the exit code."""
    with user_input():
        for name in ("n", "columns", "scale"):
            value = getattr(args, name)
            expect(value is None or value >= 1, name, "a positive whole number", value)
        finite = 0.0 <= args.temperature < float("inf")
        expect(finite, "temperature", "a number, 0 or more", args.temperature)
        expect(0 <= args.seed < 2**63, "seed", "a whole number, 0 or more", args.seed)
        out = picture_path(args.out)
        _, checkpoint, model = open_run(args)
        device = next(model.parameters()).device
        y = labels_of(args.label, args.n, checkpoint, device)
    generator, drawn = stream(device, args.seed), []
    for first in range(0, args.n, BATCH):
        count = min(BATCH, args.n - first)
        part = None if y is None else y[first : first + count]
        drawn.append(model.sample(count, args.temperature, y=part, generator=generator))
    x = torch.cat(drawn)
    bad = count_not_finite(x)
    columns = args.columns or (None if args.label else class_columns(args.n, checkpoint.config.model.n_classes))
    save_grid(to_levels(x, checkpoint.data.n_bins), checkpoint.data.n_bins, out, columns, args.scale)
    note = f" ({bad} of them not finite, shown grey)" if bad else ""
    print(f"{args.n} samples at temperature {args.temperature:g}{note}: {out}")
    return 0
