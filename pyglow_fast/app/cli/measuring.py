"""Runs the commands that measure likelihoods: evaluate, score, ood."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import write_bytes, write_text
from pyglow_fast.app.cli._arguments import IMAGES, RUN, Commands, command, open_run, output_path
from pyglow_fast.app.cli._output import say, say_next, table, user_input
from pyglow_fast.app.experiments.ood import auroc, typicality
from pyglow_fast.app.studio import OpenRun, likelihood_text, parse_image, score_files
from pyglow_fast.app.studio.pictures import made_csv, made_picture
from pyglow_fast.app.studio.reading import PARTS, Selection
from pyglow_fast.app.studio.words import File
from pyglow_fast.data import DATA_HELP, SOURCES, measure_yardsticks, optional
from pyglow_fast.train import Score, ScoredImages, histogram_png, progress_line, score_csv, score_images
from pyglow_fast.train import evaluate as evaluated

CAVEAT = (
    "note: the foreign images are the MORE likely ones. A likelihood follows what images have in common, such as\n"
    "  their smoothness, more than what they show (Nalisnick et al. 2019, Do deep generative models know what\n"
    "  they don't know?), so it cannot be trusted to flag such images; see --typicality."
)


def add(commands: Commands[Any]) -> None:
    """Declare the commands and their options."""
    command(commands, evaluate, "evaluate runs/demo", *IMAGES, "--batch-size", "--seed")

    every: tuple[str, ...] = (*RUN, "--part", "--out", "--batch-size", "--seed")
    parser = command(commands, score, "score runs/demo photo.png --picture where.png", *every)
    text = f"{DATA_HELP}; prepared as the run's own (default: those). Or image files, each cropped and scaled"
    parser.add_argument("images", nargs="*", metavar="DATA", help=text)
    text = "of image files: write where they are on the histogram of held-out images"
    parser.add_argument("--picture", metavar="PNG", help=text)

    every = (*IMAGES, "--out", "--n", "--batch-size", "--seed")
    parser = command(commands, ood, "ood runs/fashion mnist --typicality", *every, defaults={"n": 2000})
    parser.add_argument("other", metavar="OTHER", help=f"the foreign images: {DATA_HELP}; prepared in the same way")
    parser.add_argument("--other-part", choices=PARTS, help="the same of OTHER")
    parser.add_argument("--csv", metavar="CSV", help="bits/dim of each image too")
    text = "also flag by the distance to the mean bits/dim of the run's training images"
    parser.add_argument("--typicality", action="store_true", help=text)


def evaluate(args: argparse.Namespace) -> None:
    """Measure the bits per dimension of a trained model, beside yardsticks."""
    with user_input():
        opened, _ = open_run(args)
        images, _, train, part = opened.select(args.data, args.part)
    with progress_line("bits/dim", len(images)) as line:
        score = evaluated(opened.model, images, args.batch_size, args.seed, progress=line.update)
    say(f"{args.run} at step {opened.step} on {images.name}, {part}:")
    # The histogram model may know as much as the model: the run's training images, not those that are scored.
    known = train if train is not None else opened.trained_on()
    say(table({"model": score}, measure_yardsticks(known, images)), lines=True)
    if known is None:
        say(
            "  (no histogram model: it would be fitted on the images that the run was trained on, but "
            f"{opened.source} is no longer there or has changed)"
        )
    say_next("score", args.run, *([args.data] if args.data else []))


def score(args: argparse.Namespace) -> None:
    """Write the bits per dimension of each image to a CSV file."""
    given = args.images
    of_data = len(given) == 1 and given[0].partition(":")[0] in SOURCES and not os.path.isfile(given[0])
    if of_data or not given:
        _score_data(args, *given)
    else:
        _score_files(args)


def _score_files(args: argparse.Namespace) -> None:
    with user_input():
        for name, default in (("part", None), ("batch_size", 64), ("seed", 0)):
            value = getattr(args, name)
            expect(value == default, name, "no such option for image files", value)
        images = [parse_image(text, "data") for text in args.images]
        for image in images:
            there = not isinstance(image, File) or os.path.exists(image.path)
            expect(there, "data", f"{DATA_HELP}; or image files", repr(image.text))
        read = [image.text for image in images]
        with_table = bool(args.out or not args.picture)
        opened, out = open_run(args, ".csv" if with_table else "", *read)
        written = [(out, made_csv)] if with_table else []
        if args.picture is not None:
            written.append((output_path(args.picture, ".png", "picture", opened.source, *read), made_picture))
        files = [opened.pick(image) for image in images]
        if args.picture is not None:
            opened.scores()  # the histogram needs them
        scores = score_files(opened, files)
    say(f"{args.run} at step {opened.step}:")
    for found in scores:
        say(f"  {found.picked.image.text}: {likelihood_text(opened, found.bits, wait=False)}")
    for path, make in written:
        write_bytes(path, make(opened, scores).data)
        say(path)


def _score_data(args: argparse.Namespace, data: str | None = None) -> None:
    with user_input():
        expect(args.picture is None, "picture", "image files (a histogram of DATA is what ood draws)", args.picture)
        opened, out = open_run(args, ".csv", data)
        found = opened.select(data, args.part)
    result = _scored(args, opened, found)
    write_text(out, score_csv({found.part: result}))
    say(f"{args.run} at step {opened.step} on {found.images.name}, {found.part}:")
    mean = Score.of(result.scores.bits_per_dim[result.finite])
    what = f"model  {mean.mean:.3f}  ± {mean.error_text} bits/dim, {mean.images} images"
    say(f"  {what if mean.images else 'no image has a likelihood'}")
    for line in result.complaints():
        say(f"  {line}")
    say(out)


def _scored(
    args: argparse.Namespace, opened: OpenRun, found: Selection, limit: int | None = None, over_classes: bool = False
) -> ScoredImages:
    policy, total = opened.checkpoint.config.data.on_unreadable, min(len(found.images), limit or len(found.images))
    with progress_line(f"bits/dim of {found.images.name}", total) as line:
        how: dict[str, Any] = {"on_unreadable": policy, "progress": line.update, "over_classes": over_classes}
        scores = score_images(opened.model, found.images, args.batch_size, args.seed, limit, **how)
    return ScoredImages(found.images, scores, found.positions)


def ood(args: argparse.Namespace) -> None:
    """Tell foreign images by their bits/dim: histogram and AUROC."""
    with user_input():
        optional("matplotlib.figure", "the histogram")  # better missed now than when all is computed
        expect(args.n >= 2, "n", "2 images or more", args.n)
        read = (args.data, args.other)
        opened, out = open_run(args, ".png", *read)
        csv = None if args.csv is None else output_path(args.csv, ".csv", "csv", opened.source, *read)
        own, foreign = opened.select(args.data, args.part), opened.select(args.other, args.other_part)
        same = own.images.fingerprint() == foreign.images.fingerprint()
        expect(not same, "other", "other images than DATA", f"the same ones, {foreign.images.name}, {foreign.part}")
        names = [own.images.name, foreign.images.name]
        if names[0] == names[1]:  # two folders of one kind
            names = [args.data or opened.source, args.other]
        titles = (f"{names[0]}, {own.part}", f"{names[1]}, {foreign.part}")
        train = None
        if args.typicality:
            train = own.train or foreign.train or opened.trained_on()
            why = f"{opened.source}, which is no longer there or has changed"
            expect(train is not None, "typicality", "the images that the run was trained on", why)
    results = [_scored(args, opened, found, args.n, over_classes=True) for found in (own, foreign)]
    with user_input():
        first, second = (_finite(found, name) for found, name in zip(results, ("data", "other"), strict=True))
    lines = [f"{args.run} at step {opened.step}:"]
    lines += table({title: Score.of(bits) for title, bits in zip(titles, (first, second), strict=True)}).split("\n")
    value, error = auroc(first, second)
    found = _plus_minus(value, error)
    lines.append(f"AUROC {found}: how often an image of {titles[1]} has more bits/dim than one of {titles[0]}")
    if train is not None:
        known = _scored(args, opened, Selection(train, torch.arange(len(train)), train, "train"), args.n, True)
        with user_input():
            typical = float(_finite(known, "typicality").mean())
        by_typicality = _plus_minus(*auroc(typicality(first, typical), typicality(second, typical)))
        lines.append(f"AUROC {by_typicality} by typicality: the distance to {typical:.3f}, the mean in training")
    lines += [f"{item.images.name}: {line}" for item in results for line in item.complaints()]
    if opened.classes:
        lines.append("note: the model has classes: p(x) is the mean over them, of its own images as of foreign ones")
    if value + (0.0 if math.isnan(error) else 2.0 * error) < 0.5:
        lines.append(CAVEAT)
    title = f"{Path(args.run).resolve().name}: AUROC {found}"
    write_bytes(out, histogram_png(dict(zip(titles, (first, second), strict=True)), title))
    if csv is not None:
        write_text(csv, score_csv(dict(zip(titles, results, strict=True))))
    say("\n".join(map(str, [*lines, out, *([] if csv is None else [csv])])), lines=True)


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.4f} ± {'n/a' if math.isnan(error) else f'{error:.4f}'}"


def _finite(found: ScoredImages, argument: str) -> Tensor:
    values = found.scores.bits_per_dim[found.finite]
    wanted = "at least 2 images with a finite likelihood"
    expect(len(values) >= 2, argument, wanted, f"{len(values)} in {found.images.name}")
    return values
