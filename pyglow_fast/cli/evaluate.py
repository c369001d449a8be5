"""Runs ``pyglow-fast evaluate``: bits per dimension of a trained model beside the yardsticks."""

from __future__ import annotations

import argparse

from pyglow_fast._errors import check_seed
from pyglow_fast.cli._common import add_run, check_counts, open_run, say, table, user_input, whole
from pyglow_fast.cli._images import add_images, images_of
from pyglow_fast.data import measure_yardsticks
from pyglow_fast.studio.reading import trained_on
from pyglow_fast.train import evaluate


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``evaluate`` and its options."""
    about = "bits per dimension of a trained model"
    parser = commands.add_parser("evaluate", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    add_images(parser)
    parser.add_argument("--batch-size", type=whole, metavar="N", default=64, help="images at a time")
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="of the dequantisation noise")


def run(args: argparse.Namespace) -> int:
    """Evaluate the model; returns the exit code."""
    with user_input():
        check_counts(args, "batch_size")
        check_seed(args.seed)
        _, checkpoint, model = open_run(args)
        images, train, part = images_of(args, checkpoint, model)
    score = evaluate(model, images, args.batch_size, args.seed)
    say(f"{args.run} at step {checkpoint.progress['step']} on {images.name}, {part}:")
    other = train is None
    if train is None:
        # The histogram model may know as much as the model: the run's training images, not those that are scored.
        train = trained_on(checkpoint)
    say(table({"model": score}, measure_yardsticks(train, images)), lines=True)
    if train is None:
        say(
            "  (no histogram model: it would be fitted on the images that the run was trained on, but "
            f"{checkpoint.config.data.name} is no longer there or has changed)"
        )
    elif other:
        say(f"  (the histogram model was fitted on the run's own training images, {train.name})")
    return 0
