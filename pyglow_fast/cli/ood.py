"""Runs ``pyglow-fast ood``: measures how well bits/dim tells foreign images from those that a model knows."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import add_run, open_run, output_path, picture_path, say, user_input, whole
from pyglow_fast.cli._images import add_images
from pyglow_fast.cli.score import add_scoring, check_scoring, scored
from pyglow_fast.data import DATA_HELP, optional
from pyglow_fast.experiments import ScoredImages, auroc, histogram_png, typicality, write_scores
from pyglow_fast.studio.reading import PARTS, Selection, selection, trained_on
from pyglow_fast.train import Score
from pyglow_fast.train.files import write_bytes

CAVEAT = (
    "note: the foreign images are the MORE likely ones. A likelihood follows what images have in common, such as\n"
    "  their smoothness, more than what they show (Nalisnick et al. 2019, Do deep generative models know what\n"
    "  they don't know?), so it cannot be trusted to flag such images; see --typicality."
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``ood`` and its options."""
    about = "tell foreign images by their bits/dim: histogram and AUROC"
    parser = commands.add_parser("ood", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    add_images(parser)
    parser.add_argument("other", metavar="OTHER", help=f"the foreign images: {DATA_HELP}; prepared in the same way")
    parser.add_argument("--other-part", choices=PARTS, help="the same of OTHER")
    parser.add_argument("--out", required=True, metavar="PNG", help="the histogram")
    parser.add_argument("--csv", metavar="CSV", help="bits/dim of each image too")
    parser.add_argument(
        "--n", type=whole, metavar="N", default=2000, help="at most so many images of each set, drawn at random"
    )
    parser.add_argument(
        "--typicality",
        action="store_true",
        help="also flag by the distance to the mean bits/dim of the run's training images",
    )
    add_scoring(parser)


def _checked(found: ScoredImages, argument: str) -> Tensor:
    """The bits/dim that are finite.

    Raises:
        ValueError: fewer than two are.
    """
    values = found.scores.bits_per_dim[found.finite]
    wanted = "at least 2 images with a finite likelihood"
    expect(len(values) >= 2, argument, wanted, f"{len(values)} in {found.images.name}")
    return values


def _titles(args: argparse.Namespace, own: Selection, foreign: Selection) -> tuple[str, str]:
    """What the two sets are called: two folders of one kind may share a name.

    Raises:
        ValueError: both are the same images.
    """
    same = own.images.fingerprint() == foreign.images.fingerprint()
    expect(not same, "other", "other images than DATA", f"the same ones, {foreign.images.name}, {foreign.part}")
    names = [own.images.name, foreign.images.name]
    if names[0] == names[1]:
        names = [args.data, args.other]
    return f"{names[0]}, {own.part}", f"{names[1]}, {foreign.part}"


def run(args: argparse.Namespace) -> int:
    """Compare the scores of both sets; returns the exit code."""
    with user_input():
        optional("matplotlib.figure", "the histogram")  # better missed now than when all is computed
        check_scoring(args)
        expect(args.n >= 2, "n", "2 images or more", args.n)
        out = picture_path(args.out, args.data, args.other)
        csv = None if args.csv is None else output_path(args.csv, ".csv", "csv", args.data, args.other)
        _, checkpoint, model = open_run(args)
        own = selection(args.data, args.part, checkpoint, model)
        foreign = selection(args.other, args.other_part, checkpoint, model)
        titles = _titles(args, own, foreign)
        train = None
        if args.typicality:
            train = own.train or foreign.train or trained_on(checkpoint)
            why = f"{checkpoint.config.data.name}, which is no longer there or has changed"
            expect(train is not None, "typicality", "the images that the run was trained on", why)
    results = [scored(args, checkpoint, model, found, args.n) for found in (own, foreign)]
    with user_input():
        first, second = (_checked(found, name) for found, name in zip(results, ("data", "other"), strict=True))
    lines = [f"{args.run} at step {checkpoint.progress['step']}:"]
    width = max(map(len, titles))
    for title, values in zip(titles, (first, second), strict=True):
        score = Score.of(values)
        lines.append(f"  {title.ljust(width)}  {score.mean:.3f}  ± {score.error_text} bits/dim, {score.images} images")
    found = auroc(first, second)
    lines.append(f"AUROC {found.text}: how often an image of {titles[1]} has more bits/dim than one of {titles[0]}")
    if train is not None:
        known = scored(args, checkpoint, model, Selection(train, torch.arange(len(train)), train, "train"), args.n)
        with user_input():
            typical = float(_checked(known, "typicality").mean())
        by_typicality = auroc(typicality(first, typical), typicality(second, typical))
        lines.append(f"AUROC {by_typicality.text} by typicality: the distance to {typical:.3f}, the mean in training")
    for item in results:
        lines += [f"{item.images.name}: {line}" for line in item.complaints()]
    if model.config.n_classes is not None:
        lines.append("note: the model has classes: each image is scored under its own label, a foreign one's too")
    if found.below_chance:
        lines.append(CAVEAT)
    title = f"{Path(args.run).resolve().name}: AUROC {found.text}"
    write_bytes(out, histogram_png(dict(zip(titles, (first, second), strict=True)), title))
    if csv is not None:
        write_scores(csv, dict(zip(titles, results, strict=True)))
    for line in [*lines, out, *([] if csv is None else [csv])]:
        say(line)
    return 0
