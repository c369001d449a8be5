"""Runs ``pyglow-fast score``: writes the bits per dimension of each image as a CSV file."""

from __future__ import annotations

import argparse
import os

from pyglow_fast._errors import check_seed, expect
from pyglow_fast.cli._common import (
    InputError,
    add_run,
    check_counts,
    open_run,
    open_to_look,
    output_path,
    progress_bar,
    say,
    user_input,
    whole,
    write_made,
)
from pyglow_fast.data import DATA_HELP, UnreadableImageError
from pyglow_fast.data.sources import SOURCES
from pyglow_fast.experiments import ScoredImages, write_scores
from pyglow_fast.models import Glow
from pyglow_fast.studio.edits import likelihood_text
from pyglow_fast.studio.reading import PARTS, Selection, selection
from pyglow_fast.studio.scored import made_csv, made_picture, score_files
from pyglow_fast.studio.words import File, parse_image
from pyglow_fast.train import Checkpoint, Score, score_images


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``score`` and its options."""
    about = "bits per dimension of each image, to a CSV file"
    parser = commands.add_parser("score", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    text = f"{DATA_HELP}; prepared as the run's own images were. Or image files, each cropped and scaled as in training"
    parser.add_argument("data", nargs="+", metavar="DATA", help=text)
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="which part of them (default: held-out of the run's own images, all of any others)",
    )
    parser.add_argument("--out", metavar="CSV", help="the file to write")
    parser.add_argument(
        "--picture", metavar="PNG", help="of image files: write where they are on the histogram of held-out images"
    )
    add_scoring(parser)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say how images are scored."""
    parser.add_argument(
        "--samples", type=whole, metavar="N", default=1, help="draws of the dequantisation noise an image"
    )
    parser.add_argument("--batch-size", type=whole, metavar="N", default=64, help="images at a time")
    parser.add_argument("--seed", type=whole, metavar="N", default=0, help="of the dequantisation noise")


def check_scoring(args: argparse.Namespace) -> None:
    """Refuse wrong values of the options that ``add_scoring`` declares.

    Raises:
        ValueError: one is out of its range.
    """
    check_counts(args, "samples", "batch_size")
    check_seed(args.seed)


def scored(
    args: argparse.Namespace, checkpoint: Checkpoint, model: Glow, found: Selection, limit: int | None = None
) -> ScoredImages:
    """Score the images of a selection, or at random ``limit`` of them.

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
    """Score the images; returns the exit code."""
    with user_input():
        check_scoring(args)
        expect(args.out is not None or args.picture is not None, "out", "a file to write", "none")
        first = args.data[0].partition(":")[0]
        of_data = len(args.data) == 1 and first in SOURCES and not os.path.isfile(args.data[0])
    return _data(args) if of_data else _files(args)


def _files(args: argparse.Namespace) -> int:
    """Single image files; returns the exit code."""
    with user_input():
        for name, default in (("part", None), ("samples", 1), ("batch_size", 64), ("seed", 0)):
            value = getattr(args, name)
            expect(value == default, name, "no such option for image files", value)
        images = [parse_image(text, "data") for text in args.data]
        for image in images:
            there = not isinstance(image, File) or os.path.exists(image.path)
            expect(there, "data", f"{DATA_HELP}; or image files", repr(image.text))
        opened = open_to_look(args)
        texts = [opened.checkpoint.config.data.name, *(image.text for image in images)]
        out = None if args.out is None else output_path(args.out, ".csv", "out", *texts)
        picture = None if args.picture is None else output_path(args.picture, ".png", "picture", *texts)
        files = [opened.pick(image) for image in images]
        with progress_bar("bits/dim of the run's images") as progress:
            if picture is not None:
                opened.scores(progress)  # the histogram needs them
            scores = score_files(opened, files, progress)
    say(f"{args.run} at step {opened.step}:")
    for score in scores:
        say(f"  {score.picked.image.text}: {likelihood_text(opened, score.bits, wait=False)}")
    for path, make in ((out, made_csv), (picture, made_picture)):
        if path is not None:
            write_made(make(opened, scores), path)
            say(path)
    return 0


def _data(args: argparse.Namespace) -> int:
    """All images of DATA; returns the exit code."""
    with user_input():
        (data,) = args.data
        expect(args.picture is None, "picture", "image files (a histogram of DATA is what ood draws)", args.picture)
        out = output_path(args.out, ".csv", "out", data)
        _, checkpoint, model = open_run(args)
        found = selection(data, args.part, checkpoint, model)
    result = scored(args, checkpoint, model, found)
    write_scores(out, {found.part: result})
    say(f"{args.run} at step {checkpoint.progress['step']} on {found.images.name}, {found.part}:")
    score = Score.of(result.scores.bits_per_dim[result.finite])
    what = f"± {score.error_text} bits/dim, {score.images} images" if score.images else "no image has a likelihood"
    noise = ""
    if args.samples > 1 and score.images:
        spread = float(result.scores.spread[result.finite].mean())
        noise = f", {args.samples} draws each with a mean standard deviation of {spread:.4f}"
    say(f"  model  {score.mean:.3f}  {what}{noise}" if score.images else f"  {what}")
    for line in result.complaints():
        say(f"  {line}")
    say(out)
    return 0
