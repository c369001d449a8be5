"""``pyglow-fast score``: bits per dimension of each image, as a CSV file."""

from __future__ import annotations

import argparse

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import InputError, add_run, open_run, output_path, user_input, whole
from pyglow_fast.cli._images import add_images
from pyglow_fast.data import UnreadableImageError
from pyglow_fast.experiments import ScoredImages, write_scores
from pyglow_fast.models import Glow
from pyglow_fast.studio.selection import Selection, selection
from pyglow_fast.train import Checkpoint, Score, score_images


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    about = "bits per dimension of each image, to a CSV file"
    parser = commands.add_parser("score", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    add_images(parser)
    parser.add_argument("--out", required=True, metavar="CSV", help="the file to write")
    add_scoring(parser)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """How images are scored."""
    parser.add_argument(
        "--samples", type=whole, metavar="N", default=1, help="draws of the dequantisation noise an image (1)"
    )
    parser.add_argument("--batch-size", type=whole, metavar="N", default=64, help="images at a time (64)")
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="of the dequantisation noise (0)")


def check_scoring(args: argparse.Namespace) -> None:
    """Refuse wrong values of ``add_scoring``.

    Raises:
        ValueError: one is out of its range.
    """
    for name in ("samples", "batch_size"):
        expect(getattr(args, name) >= 1, name, "a positive whole number", getattr(args, name))
    expect(0 <= args.seed < 2**63, "seed", "a whole number, 0 or more", args.seed)


def scored(
    args: argparse.Namespace, checkpoint: Checkpoint, model: Glow, found: Selection, limit: int | None = None
) -> ScoredImages:
    """The images of a selection, or at random ``limit`` of them, and their scores.

    Raises:
        InputError: an image cannot be read, and the run does not skip such images; or none can.
    """
    policy = checkpoint.config.data.on_unreadable
    try:
        scores = score_images(
            model, found.images, args.batch_size, args.seed, limit, on_unreadable=policy, draws=args.samples
        )
    except UnreadableImageError as error:
        raise InputError(str(error)) from error
    return ScoredImages(found.images, scores, found.positions)


def run(args: argparse.Namespace) -> int:
    """Score; returns the exit code."""
    with user_input():
        check_scoring(args)
        out = output_path(args.out, ".csv", "out", args.data)
        _, checkpoint, model = open_run(args)
        found = selection(args.data, args.part, checkpoint, model)
    result = scored(args, checkpoint, model, found)
    write_scores(out, {found.part: result})
    print(f"{args.run} at step {checkpoint.progress['step']} on {found.images.name}, {found.part}:")
    score = Score.of(result.scores.bits_per_dim[result.finite])
    what = f"± {score.error_text} bits/dim, {score.images} images" if score.images else "no image has a likelihood"
    noise = ""
    if args.samples > 1 and score.images:
        spread = float(result.scores.spread[result.finite].mean())
        noise = f", {args.samples} draws each with a mean standard deviation of {spread:.4f}"
    print(f"  model  {score.mean:.3f}  {what}{noise}" if score.images else f"  {what}")
    for line in result.complaints():
        print(f"  {line}")
    print(out)
    return 0
