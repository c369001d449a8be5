"""Runs the commands that measure likelihoods: evaluate, score, ood, depths."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.cli import _arguments as shared
from pyglow_fast.cli._arguments import IMAGES, PICTURE, RUN, command, open_run, output, output_path, own_name, select
from pyglow_fast.cli._output import not_finite_note, progress, say, say_next, table, user_input
from pyglow_fast.data import DATA_HELP, measure_yardsticks, optional
from pyglow_fast.data.sources import SOURCES
from pyglow_fast.experiments import ScoredImages, auroc, histogram_png, typicality, write_scores
from pyglow_fast.studio import Draw, OpenRun, likelihood_text, parse_image, score_files
from pyglow_fast.studio.reading import BATCH, PARTS, Selection, trained_on
from pyglow_fast.studio.scored import made_csv, made_picture
from pyglow_fast.studio.words import TEMPERATURE, File
from pyglow_fast.train import Score, progress_line, save_grid, score_images
from pyglow_fast.train import evaluate as evaluated
from pyglow_fast.train.files import write_bytes

CAVEAT = (
    "note: the foreign images are the MORE likely ones. A likelihood follows what images have in common, such as\n"
    "  their smoothness, more than what they show (Nalisnick et al. 2019, Do deep generative models know what\n"
    "  they don't know?), so it cannot be trusted to flag such images; see --typicality."
)


def add(commands: shared.Commands[Any]) -> None:
    """Declare the commands and their options."""
    about = "measure the bits per dimension of a trained model, beside yardsticks"
    command(commands, evaluate, about, "evaluate runs/demo", *IMAGES, "--batch-size", "--seed")

    about = "write the bits per dimension of each image to a CSV file"
    every: tuple[str, ...] = (*RUN, "--part", "--out", "--samples", "--batch-size", "--seed")
    parser = command(commands, score, about, "score runs/demo photo.png --picture where.png", *every)
    text = f"{DATA_HELP}; prepared as the run's own (default: those). Or image files, each cropped and scaled"
    parser.add_argument("images", nargs="*", metavar="DATA", help=text)
    text = "of image files: write where they are on the histogram of held-out images"
    parser.add_argument("--picture", metavar="PNG", help=text)

    about = "tell foreign images by their bits/dim: histogram and AUROC"
    every = (*IMAGES, "--out", "--n", "--samples", "--batch-size", "--seed")
    parser = command(commands, ood, about, "ood runs/fashion mnist --typicality", *every, defaults={"n": 2000})
    parser.add_argument("other", metavar="OTHER", help=f"the foreign images: {DATA_HELP}; prepared in the same way")
    parser.add_argument("--other-part", choices=PARTS, help="the same of OTHER")
    parser.add_argument("--csv", metavar="CSV", help="bits/dim of each image too")
    text = "also flag by the distance to the mean bits/dim of the run's training images"
    parser.add_argument("--typicality", action="store_true", help=text)

    about = "compare runs of other depths on the same images: samples and bits/dim"
    every = ("--best", "--device", *PICTURE, "--n", "--columns", "--temperature", "--seed")
    usual = {"n": 16, "columns": 8, "temperature": TEMPERATURE}
    parser = command(commands, depths, about, "depths runs/shallow runs/deep", *every, defaults=usual)
    text = "the folders of two runs or more"
    parser.add_argument("run", nargs="+", metavar="RUN", help=text)
    text = "held-out images that are scored, at most"
    parser.add_argument("--eval-images", default=1000, help=text, **shared.COUNT)


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate the model; returns the exit code."""
    with user_input():
        opened = open_run(args)
        images, _, train, part = select(opened, args.data, args.part)
    with progress_line("bits/dim", len(images)) as line:
        score = evaluated(opened.model, images, args.batch_size, args.seed, progress=line.update)
    say(f"{args.run} at step {opened.step} on {images.name}, {part}:")
    # The histogram model may know as much as the model: the run's training images, not those that are scored.
    known = train if train is not None else trained_on(opened.checkpoint)
    say(table({"model": score}, measure_yardsticks(known, images)), lines=True)
    if known is None:
        say(
            "  (no histogram model: it would be fitted on the images that the run was trained on, but "
            f"{own_name(opened)} is no longer there or has changed)"
        )
    elif train is None:
        say(f"  (the histogram model was fitted on the run's own training images, {known.name})")
    say_next("score", args.run, *([args.data] if args.data else []))
    return 0


def score(args: argparse.Namespace) -> int:
    """Score the images; returns the exit code."""
    given = args.images
    of_data = len(given) == 1 and given[0].partition(":")[0] in SOURCES and not os.path.isfile(given[0])
    return _score_data(args, *given) if of_data or not given else _score_files(args)


def _score_files(args: argparse.Namespace) -> int:
    """Single image files; returns the exit code."""
    with user_input():
        for name, default in (("part", None), ("samples", 1), ("batch_size", 64), ("seed", 0)):
            value = getattr(args, name)
            expect(value == default, name, "no such option for image files", value)
        images = [parse_image(text, "data") for text in args.images]
        for image in images:
            there = not isinstance(image, File) or os.path.exists(image.path)
            expect(there, "data", f"{DATA_HELP}; or image files", repr(image.text))
        opened = open_run(args)
        read = (own_name(opened), *(image.text for image in images))
        out = output(args, ".csv", *read) if args.out or not args.picture else None
        picture = None if args.picture is None else output_path(args.picture, ".png", "picture", *read)
        files = [opened.pick(image) for image in images]
        with progress("bits/dim of the run's images") as line:
            if picture is not None:
                opened.scores(line)  # the histogram needs them
            scores = score_files(opened, files, line)
    say(f"{args.run} at step {opened.step}:")
    for found in scores:
        say(f"  {found.picked.image.text}: {likelihood_text(opened, found.bits, wait=False)}")
    for path, make in ((out, made_csv), (picture, made_picture)):
        if path is not None:
            write_bytes(path, make(opened, scores).data)
            say(path)
    return 0


def _score_data(args: argparse.Namespace, data: str | None = None) -> int:
    """All images of DATA; returns the exit code."""
    with user_input():
        expect(args.picture is None, "picture", "image files (a histogram of DATA is what ood draws)", args.picture)
        opened = open_run(args)
        out = output(args, ".csv", own_name(opened), data)
        found = select(opened, data, args.part)
    result = _scored(args, opened, found)
    write_scores(out, {found.part: result})
    say(f"{args.run} at step {opened.step} on {found.images.name}, {found.part}:")
    mean = Score.of(result.scores.bits_per_dim[result.finite])
    noise = ""
    if args.samples > 1 and mean.images:
        spread = float(result.scores.spread[result.finite].mean())
        noise = f", {args.samples} draws each with a mean standard deviation of {spread:.4f}"
    what = f"model  {mean.mean:.3f}  ± {mean.error_text} bits/dim, {mean.images} images{noise}"
    say(f"  {what if mean.images else 'no image has a likelihood'}")
    for line in result.complaints():
        say(f"  {line}")
    say(out)
    return 0


def _scored(args: argparse.Namespace, opened: OpenRun, found: Selection, limit: int | None = None) -> ScoredImages:
    """Score the images of a selection, or at random ``limit`` of them."""
    policy, total = opened.checkpoint.config.data.on_unreadable, min(len(found.images), limit or len(found.images))
    with progress_line(f"bits/dim of {found.images.name}", total) as line:
        how: dict[str, Any] = {"on_unreadable": policy, "draws": args.samples, "progress": line.update}
        scores = score_images(opened.model, found.images, args.batch_size, args.seed, limit, **how)
    return ScoredImages(found.images, scores, found.positions)


def ood(args: argparse.Namespace) -> int:
    """Compare the scores of both sets; returns the exit code."""
    with user_input():
        optional("matplotlib.figure", "the histogram")  # better missed now than when all is computed
        expect(args.n >= 2, "n", "2 images or more", args.n)
        opened = open_run(args)
        read = (own_name(opened), args.data, args.other)
        out = output(args, ".png", *read)
        csv = None if args.csv is None else output_path(args.csv, ".csv", "csv", *read)
        own, foreign = select(opened, args.data, args.part), select(opened, args.other, args.other_part)
        same = own.images.fingerprint() == foreign.images.fingerprint()
        expect(not same, "other", "other images than DATA", f"the same ones, {foreign.images.name}, {foreign.part}")
        names = [own.images.name, foreign.images.name]
        if names[0] == names[1]:  # two folders of one kind
            names = [args.data or own_name(opened), args.other]
        titles = (f"{names[0]}, {own.part}", f"{names[1]}, {foreign.part}")
        train = None
        if args.typicality:
            train = own.train or foreign.train or trained_on(opened.checkpoint)
            why = f"{own_name(opened)}, which is no longer there or has changed"
            expect(train is not None, "typicality", "the images that the run was trained on", why)
    results = [_scored(args, opened, found, args.n) for found in (own, foreign)]
    with user_input():
        first, second = (_finite(found, name) for found, name in zip(results, ("data", "other"), strict=True))
    lines = [f"{args.run} at step {opened.step}:"]
    lines += table({title: Score.of(bits) for title, bits in zip(titles, (first, second), strict=True)}).split("\n")
    found = auroc(first, second)
    lines.append(f"AUROC {found.text}: how often an image of {titles[1]} has more bits/dim than one of {titles[0]}")
    if train is not None:
        known = _scored(args, opened, Selection(train, torch.arange(len(train)), train, "train"), args.n)
        with user_input():
            typical = float(_finite(known, "typicality").mean())
        by_typicality = auroc(typicality(first, typical), typicality(second, typical))
        lines.append(f"AUROC {by_typicality.text} by typicality: the distance to {typical:.3f}, the mean in training")
    lines += [f"{item.images.name}: {line}" for item in results for line in item.complaints()]
    if opened.classes:
        lines.append("note: the model has classes: each image is scored under its own label, a foreign one's too")
    if found.below_chance:
        lines.append(CAVEAT)
    title = f"{Path(args.run).resolve().name}: AUROC {found.text}"
    write_bytes(out, histogram_png(dict(zip(titles, (first, second), strict=True)), title))
    if csv is not None:
        write_scores(csv, dict(zip(titles, results, strict=True)))
    say("\n".join(map(str, [*lines, out, *([] if csv is None else [csv])])), lines=True)
    return 0


def _finite(found: ScoredImages, argument: str) -> Tensor:
    """The bits/dim that are finite, at least two."""
    values = found.scores.bits_per_dim[found.finite]
    wanted = "at least 2 images with a finite likelihood"
    expect(len(values) >= 2, argument, wanted, f"{len(values)} in {found.images.name}")
    return values


@torch.no_grad()
def depths(args: argparse.Namespace) -> int:
    """Compare the runs; returns the exit code."""
    with user_input():
        expect(len(args.run) >= 2, "run", "two runs or more", len(args.run))
        opened = [open_run(args, name) for name in args.run]
        first = opened[0].checkpoint
        for item in opened[1:]:
            data = item.checkpoint.data
            same = data.fingerprint == first.data.fingerprint and data.n_bins == first.data.n_bins
            wanted = f"runs on the images of {opened[0].name!r}, {own_name(opened[0])}, prepared alike"
            expect(same, "run", wanted, f"{own_name(item)} in {item.name!r}")
        out = output(args, ".png", own_name(opened[0]))
        held_out = [select(item).images for item in opened]
    rows: list[tuple[str, Tensor]] = []
    for item, images in zip(opened, held_out, strict=True):
        with progress_line(f"bits/dim of {item.name}", min(len(images), args.eval_images)) as line:
            score = evaluated(item.model, images, BATCH, 0, args.eval_images, progress=line.update)
        config = item.model.config
        shape = f"L = {config.n_levels}, K = {config.n_steps}"
        drawn = item.drawn(Draw(args.n, args.temperature, args.seed))
        say(
            f"{item.name} at step {item.step}: {shape}, {score.mean:.3f} ± {score.error_text} bits/dim held out "
            f"({score.images} images){not_finite_note(drawn.not_finite, 'samples')}"
        )
        label = f"{item.folder.path.resolve().name}\n{shape}\n{score.mean:.3f} bits/dim"
        rows += [(label if i == 0 else "", part) for i, part in enumerate(drawn.pixels.split(args.columns))]
    if len({(item.checkpoint.config.seed, item.checkpoint.config.data.held_out) for item in opened}) > 1:
        say("note: the runs differ in --seed or --held-out; where the split is random, so do their held-out images")
    title = f"samples at temperature {args.temperature:g}, seed {args.seed}"
    save_grid(rows, first.data.n_bins, out, [], args.scale, title)
    say(f"{args.n} samples of each: {out}")
    return 0
