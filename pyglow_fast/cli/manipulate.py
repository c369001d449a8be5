"""Runs ``pyglow-fast manipulate``: adds an attribute to held-out images along a direction of training images."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._settings import value_text
from pyglow_fast.cli._common import add_run, number, open_run, output_path, picture_path, say, user_input, whole
from pyglow_fast.cli._latents import add_picture, add_space, check_options, not_finite_note, read, save
from pyglow_fast.cli._tones import TonePairs, copy_and_table, tone_pairs, write_scores
from pyglow_fast.data import DATA_HELP, Images, load_data, split
from pyglow_fast.data.emoji import TONES
from pyglow_fast.latents import MeanLatent, attribute_direction, manipulate, to_space
from pyglow_fast.latents.spaces import check_levels, check_numbers
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.models import Glow
from pyglow_fast.studio.reading import config_for, inputs, middles, name_of
from pyglow_fast.train import Checkpoint, check_fits
from pyglow_fast.train.seeds import random_subset

REST = "rest"
STRENGTHS, TONE_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0), (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``manipulate`` and its options."""
    about = "add an attribute to held-out images, along the difference of mean latents of training images"
    parser = commands.add_parser("manipulate", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    parser.add_argument(
        "data", metavar="DATA", help=f"{DATA_HELP}; with labels, prepared and split as the run's own images were"
    )
    parser.add_argument("--plus", metavar="CLASS", help="the class of the images with the attribute")
    parser.add_argument("--minus", metavar="CLASS", help=f"that of those without, or {REST}: all others")
    parser.add_argument(
        "--tone", choices=tuple(TONES.values()), help="emoji: from the emoji to this skin tone, scored by true targets"
    )
    parser.add_argument("--attribute", metavar="NAME", help="celeba: the attribute that gives NAME and 'not NAME'")
    text = "multiples of the difference of the means"
    parser.add_argument(
        "--strengths",
        type=number,
        nargs="+",
        metavar="S",
        help=f"{text} (default: {value_text(STRENGTHS)}; with --tone: {value_text(TONE_STRENGTHS)})",
    )
    parser.add_argument(
        "--levels", type=whole, nargs="+", metavar="L", help="levels that are edited, 0 the shallowest (default: all)"
    )
    parser.add_argument("--n", type=whole, metavar="N", default=8, help="images that are shown")
    parser.add_argument(
        "--train-images", type=whole, metavar="N", help="at most so many training images of each side (default: all)"
    )
    parser.add_argument("--csv", metavar="CSV", help="with --tone: write the scores to this file, too")
    add_space(parser)
    add_picture(parser, "which images")


@dataclass(frozen=True)
class Task:
    """The work that was asked for, as indices into the images.

    Args:
        plus, minus: training images with and without the attribute.
        edited: held-out images.
        words: a description of the edit for people.
        tones: the pairs of emoji with the true targets, or None.
    """

    plus: Tensor
    minus: Tensor
    edited: Tensor
    words: str
    tones: TonePairs | None = None


def _images(args: argparse.Namespace, checkpoint: Checkpoint, model: Glow) -> tuple[Images, Tensor, Tensor]:
    """Load (all images of DATA, indices of the training images, indices of the held-out ones)."""
    stored = checkpoint.config.data
    config = config_for(args.data, stored, model)
    if args.attribute is not None:
        same = model.config.n_classes is None or args.attribute == stored.attribute
        expect(same, "attribute", f"{stored.attribute!r}, which the model is conditioned on", repr(args.attribute))
        config = replace(config, attribute=args.attribute)
    data = load_data(config)
    check_fits(model, data, checkpoint.data.n_bins)
    return data, *split(data, config.held_out, checkpoint.config.seed)


def _class_task(args: argparse.Namespace, data: Images, train: Tensor, held_out: Tensor) -> Task:
    """Make the task of two classes, or of one and all others."""
    for name in ("plus", "minus"):
        expect(getattr(args, name) is not None, name, "a class (or --tone, for emoji)", "none")
    expect(args.csv is None, "csv", "--tone beside it: only there true targets are known", repr(args.csv))
    labels, classes = data.labels, data.class_names
    expect(labels is not None, "data", "images with labels", f"none in {data.name}")
    assert labels is not None
    expect(args.plus in classes, "plus", f"one of {', '.join(classes)}", repr(args.plus))
    known = args.minus in classes or args.minus == REST
    expect(known, "minus", f"{REST} or one of {', '.join(classes)}", repr(args.minus))
    expect(args.minus == REST or args.plus != args.minus, "minus", "another class than plus", repr(args.minus))
    with_it = labels == classes.index(args.plus)
    without = ~with_it if args.minus == REST else labels == classes.index(args.minus)
    sides = {"plus": (with_it, args.plus), "minus": (without, args.minus)}
    trained = {}
    for i, (name, (mask, text)) in enumerate(sides.items()):
        found = train[mask[train]]
        expect(len(found) > 0, name, "a class with training images", f"none of {text!r}")
        limit = len(found) if args.train_images is None else args.train_images
        trained[name] = found[random_subset(args.seed + i, len(found), limit)]
    # Half of those that are shown have the attribute already, where there are enough of both.
    pools = [held_out[mask[held_out]] for mask in (without, with_it)]
    expect(len(pools[0]) + len(pools[1]) > 0, "plus", "held-out images of either class", "none")
    half = max(args.n - args.n // 2, args.n - len(pools[1]))
    first = pools[0][random_subset(args.seed, len(pools[0]), half)]
    shown = torch.cat([first, pools[1][random_subset(args.seed, len(pools[1]), args.n - len(first))]])
    return Task(trained["plus"], trained["minus"], shown, f"{args.plus} minus {args.minus}")


def _tone_task(args: argparse.Namespace, checkpoint: Checkpoint, data: Images, model: Glow, held_out: Tensor) -> Task:
    """Make the task of emoji and the same ones in a skin tone."""
    for name in ("plus", "minus", "train_images"):
        given = getattr(args, name)
        expect(given is None, name, "no such option beside --tone, which takes all pairs", repr(given))
    pairs = tone_pairs(args.tone, data, config_for(args.data, checkpoint.config.data, model), held_out)
    return Task(pairs.train_variants, pairs.train_bases, pairs.bases, f"skin tone {args.tone}", pairs)


def mean_over(model: Glow, data: Images, indices: Tensor, space: str) -> tuple[MeanLatent, MeanLatent]:
    """Average over the images at ``indices``: their latents, and x itself."""
    latents, pixels = MeanLatent(), MeanLatent()
    for pixel, label in read(data, indices):
        x, y = inputs(pixel, label, data.n_bins, model)
        latents.add(to_space(model, x, space, y))
        pixels.add([x])
    return latents, pixels


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Manipulate the images; returns the exit code."""
    with user_input():
        check_options(args, "n", "train_images")
        strengths = check_numbers("strengths", args.strengths or (TONE_STRENGTHS if args.tone else STRENGTHS))
        out = picture_path(args.out, args.data)
        csv = None if args.csv is None else output_path(args.csv, ".csv", "csv", args.data)
        scheme = args.data.partition(":")[0]
        expect(args.tone is None or scheme == "emoji", "tone", "emoji as DATA, which have tones", repr(args.data))
        _, checkpoint, model = open_run(args)
        levels = check_levels(args.levels, len(model.latent_shapes))
        data, train, held_out = _images(args, checkpoint, model)
        if args.tone:
            task = _tone_task(args, checkpoint, data, model, held_out)
        else:
            task = _class_task(args, data, train, held_out)
    (plus, plus_x), (minus, minus_x) = (mean_over(model, data, side, args.space) for side in (task.plus, task.minus))
    direction = attribute_direction(plus, minus)
    originals, edits = [], []
    for part in read(data, task.edited):
        x, y = inputs(*part, data.n_bins, model)
        originals.append(x)
        with user_input():  # strengths that float32 cannot hold in an edit
            edits.append(manipulate(model, x, direction, strengths, levels, args.space, y))
    x, edited = torch.cat(originals), torch.cat(edits)
    how = f"{args.space} space, level{'s' if len(levels) > 1 else ''} {' '.join(map(str, levels))}"
    say(
        f"{task.words}: mean of {plus.count} training images minus mean of {minus.count}, {how}; "
        f"{len(x)} held-out images of {data.name}, {len(strengths)} strengths"
        f"{not_finite_note(count_not_finite(edited.flatten(0, 1)), 'edits')}"
    )
    if args.space == "noise" and model.config.n_classes is not None:
        say("note: the model has classes: noise under an image's own class holds little of it; see --space latent")
    columns = ["original", *(f"{value:+g}" for value in strengths)]
    target = None
    if task.tones is not None:
        target = torch.cat([middles(part, data.n_bins, model) for part, _ in read(data, task.tones.targets)])
        (pixels,) = attribute_direction(plus_x, minus_x)
        scores, text = copy_and_table(x, edited, target, pixels, strengths)
        say(text, lines=True)
        if csv is not None:
            write_scores(scores, csv)
            say(f"scores: {csv}")
        columns.append("true target")
    rows = []
    for i in random_subset(args.seed, len(x), min(args.n, len(x))).tolist():
        ends = [] if target is None else [target[i : i + 1]]
        index = int(task.edited[i])
        name = name_of(data, index, int((held_out == index).nonzero()))
        rows.append((name, torch.cat([x[i : i + 1], edited[i], *ends])))
    save(out, rows, data.n_bins, columns, f"{task.words}: {how}", args.scale)
    say(f"{len(rows)} of the images: {out}" if len(rows) < len(x) else f"picture: {out}")
    return 0
