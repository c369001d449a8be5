"""Runs ``pyglow-fast interpolate``: from one image to another through the latents of every level."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import (
    add_run,
    check_counts,
    number,
    open_run,
    open_to_look,
    output_path,
    picture_path,
    say,
    user_input,
    whole,
    write_made,
)
from pyglow_fast.cli._images import add_images, images_of
from pyglow_fast.cli._latents import SPACE_WORDS, add_picture, check_options, not_finite_note, read, save
from pyglow_fast.data import DATA_HELP, Images
from pyglow_fast.latents import DEFAULT_SPACE, SPACES, interpolate
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.studio.edits import Subject
from pyglow_fast.studio.pictures import ANIMATED, Between
from pyglow_fast.studio.reading import inputs, name_of
from pyglow_fast.studio.words import IMAGE_HELP, parse_image
from pyglow_fast.train import derive, to_pixels

PAIRS = 4
FRAMES = 8
SPACE_HELP = f"{SPACE_WORDS} (default: {DEFAULT_SPACE}, with --from that of the command edit)"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``interpolate`` and its options."""
    about = "paths from one image to another through the latents"
    parser = commands.add_parser("interpolate", help=about, description=about)
    parser.set_defaults(run_command=run, optional_last="data")
    add_run(parser)
    add_images(parser, nargs="?")
    parser.add_argument(
        "--from", dest="first", metavar="IMAGE", help=f"instead of DATA, one path from here: {IMAGE_HELP}"
    )
    parser.add_argument("--to", dest="last", metavar="IMAGE", help="and to here")
    parser.add_argument(
        "--labels", nargs=2, metavar="CLASS", help="with --from: the classes of both (default: their own)"
    )
    parser.add_argument("--at", type=number, metavar="T", help="with --from: the one frame at T, from 0 to 1")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--images",
        type=whole,
        nargs="+",
        action="append",
        metavar="I",
        help="the numbers of two images of the part, from 0; may be repeated",
    )
    which.add_argument("--pairs", type=whole, metavar="N", help=f"so many random pairs (default: {PAIRS})")
    parser.add_argument("--frames", type=whole, metavar="N", default=FRAMES, help="images on each path, both ends too")
    parser.add_argument("--spherical", action="store_true", help="on great circles, level by level, not straight")
    parser.add_argument("--space", choices=SPACES, help=SPACE_HELP)
    add_picture(parser, "the random pairs", "PNG, with --from also GIF or WEBP: there and back again")


def pairs_of(args: argparse.Namespace, images: Images) -> Tensor:
    """Choose the images that paths go between, by their indices (n, 2).

    Raises:
        ValueError: not two different images that there are.
    """
    count = len(images)
    if args.images is None:
        pairs = args.pairs or PAIRS
        expect(
            args.pairs is None or 2 * pairs <= count,
            "pairs",
            f"at most {count // 2}, as there are {count} images",
            args.pairs,
        )
        expect(count >= 2, "data", "two images or more to interpolate between", count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive(args.seed, "pairs")))
        pairs = min(pairs, count // 2)
        return order[: 2 * pairs].reshape(pairs, 2)
    for pair in args.images:
        text = " ".join(map(str, pair))
        expect(len(pair) == 2 and pair[0] != pair[1], "images", "the numbers of two different images", text)
        inside = all(0 <= index < count for index in pair)
        expect(inside, "images", f"numbers in 0..{count - 1}", text)
    return torch.tensor(args.images)


def run(args: argparse.Namespace) -> int:
    """Interpolate between images; returns the exit code."""
    with user_input():
        named = args.first is not None or args.last is not None
        expect(args.data is not None or named, "data", f"{DATA_HELP}; or --from and --to", "none")
        expect(args.data is None or not named, "data", "either DATA, or --from and --to", "both")
        for name in ("labels", "at"):
            value = getattr(args, name)
            expect(named or value is None, name, "--from and --to beside it", value)
    return _between(args) if named else _pairs(args)


@torch.no_grad()
def _between(args: argparse.Namespace) -> int:
    """One path, from --from to --to; returns the exit code."""
    with user_input():
        check_options(args)
        for name in ("images", "pairs", "part"):
            value = getattr(args, name)
            expect(value is None, name, "DATA beside it, not --from and --to", value)
        for name, value in (("from", args.first), ("to", args.last)):
            expect(value is not None, name, "an image, since the other end is given", "none")
        check_counts(args, "frames")
        expect(args.at is None or 0.0 <= args.at <= 1.0, "at", "a number in 0..1", args.at)
        expect(args.at is None or args.frames == FRAMES, "frames", "no such option beside --at", args.frames)
        expect(args.seed == 0, "seed", "DATA beside it, not --from and --to", args.seed)
        images = (parse_image(args.first, "from"), parse_image(args.last, "to"))
        suffix = Path(args.out).suffix.lower()
        endings = (".png", *ANIMATED) if args.at is None else (".png",)
        expect(suffix in endings, "out", f"a name ending in {' or '.join(endings)}", repr(args.out))
        opened = open_to_look(args)
        read_from = (opened.checkpoint.config.data.name, *(image.text for image in images))
        out = output_path(args.out, suffix, "out", *read_from)
        labels = [opened.label(word) for word in args.labels] if args.labels else [None, None]
        first, last = (opened.pick(image, label) for image, label in zip(images, labels, strict=True))
        space = args.space or opened.space
        path = Between(Subject(opened, first, space), Subject(opened, last, space), args.spherical)
        frames, bad = path.frames(args.frames, None if args.at is None else (args.at,))
    if args.at is None:
        write_made(path.made(frames, out.suffix.lower(), args.scale), out)
    else:
        write_made(path.made_frame(frames[0], args.at, args.scale), out)
    how = "spherical" if args.spherical else "linear"
    what = f"{len(frames)} images" if args.at is None else f"the image at {args.at:g}"
    say(f"{what} of a {how} path in {path.space} space{not_finite_note(bad)}: {out}")
    return 0


@torch.no_grad()
def _pairs(args: argparse.Namespace) -> int:
    """Labelled paths between images of DATA; returns the exit code."""
    args.space = args.space or DEFAULT_SPACE
    with user_input():
        check_options(args, "pairs")
        check_counts(args, "frames")
        out = picture_path(args.out, args.data)
        _, checkpoint, model = open_run(args)
        images, _, part = images_of(args, checkpoint, model)
        pairs = pairs_of(args, images)
    n_bins, rows, error, changed, bad = images.n_bins, [], 0.0, 0, 0
    # Both ends of a pair follow each other, and a batch is even: no pair is cut.
    first = 0
    for pixels, labels in read(images, pairs.flatten()):
        x, y = inputs(pixels, labels, n_bins, model)
        ends_y = None if y is None else (y[::2], y[1::2])
        paths = interpolate(model, x[::2], x[1::2], args.frames, args.spherical, args.space, ends_y)
        ends = paths[:, [0, -1]].flatten(0, 1)  # in the order of x
        error = float(torch.cat([ends - x, torch.full_like(x[:1], error)]).abs().max())  # unlike max(), keeps a NaN
        changed += int((to_pixels(ends, n_bins).cpu() != pixels).sum())
        bad += count_not_finite(paths.flatten(0, 1))
        for i, path in enumerate(paths):
            names = [name_of(images, int(index)) for index in pairs[first + i]]
            rows.append(("\n→ ".join(names), torch.cat([x[2 * i : 2 * i + 1], path, x[2 * i + 1 : 2 * i + 2]])))
        first += len(paths)
    how = "spherical" if args.spherical else "linear"
    columns = ["A", *(f"{i / (args.frames - 1):.2g}" for i in range(args.frames)), "B"]
    what = f"{images.name}, {part}: {how} paths in {args.space} space"
    save(out, rows, n_bins, columns, what, args.scale)
    say(
        f"{len(pairs)} pairs of {what}, {args.frames} frames{not_finite_note(bad, 'images')}; "
        f"ends off by at most {error:.3g} ({error * n_bins:.2g} grey levels), {changed} grey levels changed: {out}"
    )
    return 0
