"""Runs the commands that look at a run: sample, temperatures, levels, reconstruct, interpolate, edit, manipulate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import latents
from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments
from pyglow_fast.cli import _arguments as shared
from pyglow_fast.cli._arguments import COUNT, IMAGES, PICTURE, RUN, command, number, open_run, output, own_name, select
from pyglow_fast.cli._output import not_finite_note, progress, say, say_next, user_input
from pyglow_fast.data import Images
from pyglow_fast.latents.spaces import check_levels, check_numbers
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.studio import Add, Between, Draw, Edit, Grid, OpenRun, Picked, Subject, likelihood_text, parse_image
from pyglow_fast.studio.directions import REST
from pyglow_fast.studio.pictures import ANIMATED
from pyglow_fast.studio.reading import inputs, name_of
from pyglow_fast.studio.words import IMAGE_HELP, TEMPERATURE, HeldOut, N
from pyglow_fast.train import class_cycle, derive, device_of, save_grid, to_pixels
from pyglow_fast.train.files import write_bytes
from pyglow_fast.train.seeds import random_subset

PAIRS, FRAMES = 4, 8
STRENGTHS = [-2.0, -1.0, 0.0, 1.0, 2.0]
TEMPERATURES = [0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0]
NUMBERS: dict[str, Any] = {"type": number, "nargs": "+", "metavar": "X"}
WHOLE: dict[str, Any] = {"type": shared.whole, "nargs": "+", "metavar": "I"}


def add(commands: shared.Commands[Any]) -> None:
    """Declare the commands and their options."""
    about, example = "draw images from a trained model", "sample runs/demo --n 40 --temperature 0.7"
    every: tuple[str, ...] = (*RUN, *PICTURE, "--n", "--temperature", "--seed", "--label", "--columns")
    command(commands, sample, about, example, *every, defaults={"n": N, "temperature": TEMPERATURE})

    about = "draw images of the same noise at several temperatures, a row each"
    every = (*RUN, *PICTURE, "--n", "--seed", "--label")
    parser = command(commands, temperatures, about, "temperatures runs/demo --n 10", *every, defaults={"n": 8})
    text = "what multiplies the deviation of the priors"
    parser.add_argument("--temperatures", default=TEMPERATURES, help=text, **NUMBERS)

    about, example = "encode and decode images, and print the largest error", "reconstruct runs/demo --n 12"
    command(commands, reconstruct, about, example, *IMAGES, *PICTURE, "--n", defaults={"n": 16})

    about = "go from image to image through the latents"
    example = "interpolate runs/demo --from 0 --to 9 --out path.gif"
    parser = command(commands, interpolate, about, example, *IMAGES, *PICTURE, "--seed", "--space")
    text = f"one path from here, to a PNG, GIF or WEBP (there and back again): {IMAGE_HELP}"
    parser.add_argument("--from", dest="first", metavar="IMAGE", help=text)
    parser.add_argument("--to", dest="last", metavar="IMAGE", help="and to here")
    text = "with --from: the classes of both (default: their own)"
    parser.add_argument("--labels", nargs=2, metavar="CLASS", help=text)
    parser.add_argument("--at", type=number, metavar="T", help="with --from: the one frame at T, from 0 to 1")
    which = parser.add_mutually_exclusive_group()
    text = "paths between two images of the part, by number from 0; may be repeated"
    which.add_argument("--images", action="append", help=text, **WHOLE)
    which.add_argument("--pairs", help=f"paths between so many random pairs (default: {PAIRS})", **COUNT)
    parser.add_argument("--frames", default=FRAMES, help="images on each path, both ends too", **COUNT)
    parser.add_argument("--spherical", action="store_true", help="on great circles, level by level, not straight")

    about = "edit one image: add attributes, keep a share of each level's latents"
    every = (*RUN, *PICTURE, "--space", "--train-images")
    parser = command(commands, edit, about, "edit runs/demo 0 --add 3 rest 1", *every)
    text = f"{IMAGE_HELP}; a file is cropped and scaled as in training"
    parser.add_argument("image", metavar="IMAGE", help=text)
    text = (
        "S times the way from the mean latent of MINUS to that of PLUS, each a class or attribute of the run's images; "
        f"MINUS may be {REST}, those without PLUS; may be repeated"
    )
    parser.add_argument("--add", nargs=3, action="append", metavar=("PLUS", "MINUS", "S"), help=text)
    text = "the share of the image's own latents that each level keeps, 0 to 1, the shallowest first (default: all)"
    parser.add_argument("--keep", help=text, **NUMBERS)
    text = "the image's class (default: its own; of a file the likeliest)"
    parser.add_argument("--label", metavar="CLASS", help=text)
    text = "instead add the differences of the mean pixels to the pixels"
    parser.add_argument("--pixel-shift", action="store_true", help=text)

    about = "add an attribute to images at several strengths, along the difference of mean latents of training images"
    every = (*IMAGES, *PICTURE, "--n", "--seed", "--space", "--train-images")
    parser = command(commands, manipulate, about, "manipulate runs/demo --plus 3 --minus 8", *every, defaults={"n": 8})
    text = "a class or attribute of the run's images"
    parser.add_argument("--plus", metavar="NAME", required=True, help=f"{text}, which is added")
    parser.add_argument("--minus", metavar="NAME", default=REST, help=f"{text} to begin from; {REST}: all without PLUS")
    parser.add_argument("--strengths", default=STRENGTHS, help="multiples of the difference of the means", **NUMBERS)
    parser.add_argument("--levels", help="levels that are edited, 0 the shallowest (default: all)", **WHOLE)

    about = "reconstruct images from some levels of their latents, the others drawn from their priors"
    every = (*IMAGES, *PICTURE, "--n", "--seed", "--temperature")
    parser = command(commands, levels, about, "levels runs/demo --n 6", *every, defaults={"n": 8, "temperature": 0.0})
    text = "levels that are kept, 0 the shallowest; may be repeated (default: the deepest, the deepest two, ...)"
    parser.add_argument("--keep", action="append", help=text, **WHOLE)


def sample(args: argparse.Namespace) -> int:
    """Write a grid of images that the model draws; returns the exit code."""
    with user_input():
        opened = open_run(args)
        out = output(args, ".png", own_name(opened))
        labels = tuple(opened.label(name) for name in args.label or ())
        grid = Grid(opened, Draw(args.n, args.temperature, args.seed, labels))
    write_bytes(out, grid.made(args.columns, args.scale).data)
    note = not_finite_note(grid.drawn.not_finite)
    say(f"{args.n} samples at temperature {args.temperature:g}{note}: {out}")
    say_next("serve", args.run)
    return 0


@torch.no_grad()
def temperatures(args: argparse.Namespace) -> int:
    """Draw images from the same noise at several temperatures; returns the exit code."""
    with user_input():
        for value in args.temperatures:
            expect(0.0 <= value < float("inf"), "temperatures", "numbers, 0 or more", value)
        opened = open_run(args)
        out, device = output(args, ".png", own_name(opened)), device_of(opened.model)
        chosen = torch.tensor([opened.label(name) for name in args.label or opened.classes], device=device)
        cycle = class_cycle(args.n, len(chosen) or None, device)
        y = None if cycle is None else chosen[cycle]
    noise = torch.Generator(device).manual_seed(args.seed)
    sweep = latents.temperature_sweep(opened.model, args.temperatures, args.n, y, generator=noise)
    columns = [] if y is None else [opened.classes[label] for label in y.tolist()]
    rows = [(f"T = {value:g}", x) for value, x in zip(args.temperatures, sweep, strict=True)]
    _save(out, rows, opened, columns, f"{args.run}: samples of the same noise", args.scale)
    note = not_finite_note(count_not_finite(sweep.flatten(0, 1)))
    say(f"{args.n} samples at each of {len(args.temperatures)} temperatures{note}: {out}")
    return 0


@torch.no_grad()
def reconstruct(args: argparse.Namespace) -> int:
    """Show images, and what comes back when they are encoded and decoded; returns the exit code."""
    with user_input():
        opened = open_run(args)
        out = output(args, ".png", own_name(opened), args.data)
        images, _, _, part = select(opened, args.data, args.part)
    pixels, x, _ = _read(opened, images, torch.arange(min(args.n, len(images))))
    back = opened.model.decode(opened.model.encode(x))
    error = float((back - x).abs().max())
    found = to_pixels(back, opened.n_bins).cpu()
    changed = int((found != pixels).sum())
    pairs = zip(pixels.long().split(16), found.split(16), strict=True)
    rows = [("", row) for pair in pairs for row in pair]
    save_grid(rows, opened.n_bins, out, scale=args.scale)
    say(
        f"{len(pixels)} images of {images.name}, {part}: max |decode(encode(x)) - x| = {error:.3g} "
        f"({error * opened.n_bins:.2g} grey levels), {changed} of {pixels.numel()} grey levels changed: {out}"
    )
    return 0


def interpolate(args: argparse.Namespace) -> int:
    """Go from image to image: between two that are named, or between pairs of a set; returns the exit code."""
    named, given = args.first is not None or args.last is not None, vars(args)
    with user_input():
        for name in ("data", "images", "pairs", "part") if named else ("labels", "at"):
            beside = "no such option beside --from and --to" if named else "--from and --to beside it"
            expect(given[name] is None, name, beside, given[name])
        for name, value in (("from", args.first), ("to", args.last)):
            expect(not named or value is not None, name, "an image, since the other end is given", "none")
        opened = open_run(args)
    return _one_path(args, opened) if named else _paths_of_pairs(args, opened)


def _one_path(args: argparse.Namespace, opened: OpenRun) -> int:
    """The path from --from to --to; returns the exit code."""
    with user_input():
        expect(args.at is None or 0.0 <= args.at <= 1.0, "at", "a number in 0..1", args.at)
        suffix = Path(args.out or ".").suffix.lower()
        suffix = suffix if args.at is None and suffix in ANIMATED else ".png"
        out = output(args, suffix, own_name(opened), args.first, args.last)
        labels = [opened.label(name) for name in args.labels] if args.labels else [None, None]
        images = (parse_image(args.first, "from"), parse_image(args.last, "to"))
        path = _path(args, opened, [opened.pick(image, label) for image, label in zip(images, labels, strict=True)])
        frames, bad = path.frames(args.frames, None if args.at is None else (args.at,))
    if args.at is None:
        what, made = f"{len(frames)} images", path.made(frames, suffix, args.scale)
    else:
        what, made = f"the image at {args.at:g}", path.made_frame(frames[0], args.at, args.scale)
    write_bytes(out, made.data)
    say(f"{what} of a {_how(path)}{not_finite_note(bad)}: {out}")
    return 0


def _paths_of_pairs(args: argparse.Namespace, opened: OpenRun) -> int:
    """Labelled paths between images of DATA; returns the exit code."""
    with user_input():
        out = output(args, ".png", own_name(opened), args.data)
        images, _, _, part = select(opened, args.data, args.part)
        rows, changed, bad = [], 0, 0
        for pair in _chosen_pairs(args, len(images)):
            pixels, labels = images.batch(torch.tensor(pair))
            own = labels.tolist() if labels is not None and opened.classes else [None, None]
            path = _path(args, opened, [Picked(*end) for end in zip(pixels, own, map(HeldOut, pair), strict=True)])
            frames, ruined = path.frames(args.frames)
            changed, bad = changed + int((frames[[0, -1]] != pixels).sum()), bad + ruined
            name = "\n→ ".join(name_of(images, index) for index in pair)
            rows.append((name, torch.cat([pixels[:1].long(), frames, pixels[1:].long()])))
    how, columns = _how(path, "paths"), ["A", *(f"{i / (args.frames - 1):.2g}" for i in range(args.frames)), "B"]
    save_grid(rows, opened.n_bins, out, columns, args.scale, f"{images.name}, {part}: {how}")
    count = "1 pair" if len(rows) == 1 else f"{len(rows)} pairs"
    what = f"{count} of {images.name}, {part}: {how}{not_finite_note(bad, 'images')}"
    say(f"{what}, {changed} grey levels changed at both ends: {out}")
    return 0


def _path(args: argparse.Namespace, opened: OpenRun, ends: list[Picked]) -> Between:
    first, last = (Subject(opened, end, args.space or opened.space) for end in ends)
    return Between(first, last, args.spherical)


def _how(path: Between, noun: str = "path") -> str:
    return f"{'spherical' if path.spherical else 'linear'} {noun} in {path.space} space"


def _chosen_pairs(args: argparse.Namespace, count: int) -> list[list[int]]:
    """The images of the set that paths go between: those of --images, or random ones."""
    if args.images is None:
        pairs = min(PAIRS, count // 2) if args.pairs is None else args.pairs
        expect(0 < 2 * pairs <= count, "pairs", f"two images for each, of the {count} that there are", pairs)
        generator = torch.Generator().manual_seed(derive(args.seed, "pairs"))
        found: list[list[int]] = torch.randperm(count, generator=generator)[: 2 * pairs].reshape(pairs, 2).tolist()
        return found
    for pair in args.images:
        text = " ".join(map(str, pair))
        expect(len(pair) == 2 and pair[0] != pair[1], "images", "the numbers of two different images", text)
        expect(all(0 <= index < count for index in pair), "images", f"numbers in 0..{count - 1}", text)
    return list(args.images)


@torch.no_grad()
def edit(args: argparse.Namespace) -> int:
    """Edit one image; returns the exit code."""
    with user_input():
        adds = tuple(Add(plus, minus, _strength(text)) for plus, minus, text in args.add or ())
        changed = Edit(adds, tuple(args.keep or ()))
        for share in changed.keep:
            expect(0.0 <= share <= 1.0, "keep", "shares in 0..1", share)
        expect(not (args.keep and args.pixel_shift), "keep", "no such option beside --pixel-shift", args.keep)
        image = parse_image(args.image)
        opened = open_run(args)
        out = output(args, ".png", own_name(opened), image.text)
        label = None if args.label is None else opened.label(args.label)
        subject = Subject(opened, opened.pick(image, label), args.space or opened.space)
        with progress("mean latents") as line:
            found = subject.edited(changed, args.pixel_shift, line)
    shown = found.pixels if found.shifted is None else found.shifted
    write_bytes(out, subject.made(shown, changed, args.pixel_shift, args.scale).data)
    with progress("bits/dim of the run's images") as line:
        after = subject.bits_of(shown)
        for name, bits in (("before", subject.bits), ("after", after)):
            say(f"{name}: {likelihood_text(opened, bits, line)}")
    outside = "" if args.pixel_shift else subject.outside(found, after)
    if outside:
        say(f"note: {outside}")
    say(f"picture: {out}")
    return 0


def _strength(text: str) -> float:
    """The third word of --add."""
    try:
        return check_numbers("add", [float(text)])[0]
    except ValueError:
        raise ValueError(f"add: expected a finite number as the third word, found {text!r}") from None


@torch.no_grad()
def manipulate(args: argparse.Namespace) -> int:
    """Add an attribute to held-out images along a direction of training images; returns the exit code."""
    with user_input():
        strengths = check_numbers("strengths", args.strengths)
        opened = open_run(args)
        out, space = output(args, ".png", own_name(opened), args.data), args.space or opened.space
        edited = check_levels(args.levels, len(opened.model.latent_shapes))
        images, _, _, part = select(opened, args.data, args.part)
        with progress("mean latents") as line:
            direction, _ = opened.directions(space, line).shift([Add(args.plus, args.minus, 1.0)])
        assert direction is not None  # its strength is not 0
        indices = random_subset(args.seed, len(images), min(args.n, len(images)))
        _, x, y = _read(opened, images, indices)
        found = latents.manipulate(opened.model, x, direction, strengths, edited, space, y)
    what = f"{args.plus} minus {args.minus}, {space} space, levels {' '.join(map(str, sorted(edited)))}"
    rows = [(name_of(images, int(index)), torch.cat([x[i : i + 1], found[i]])) for i, index in enumerate(indices)]
    _save(out, rows, opened, ["image", *(f"{value:+g}" for value in strengths)], what, args.scale)
    note = not_finite_note(count_not_finite(found.flatten(0, 1)), "edits")
    say(f"{what}: {len(x)} {part} images of {images.name}, {len(strengths)} strengths{note}: {out}")
    say_next("edit", args.run, "0", "--add", args.plus, args.minus, "1")
    return 0


@torch.no_grad()
def levels(args: argparse.Namespace) -> int:
    """Show what is left of images when only some levels of their latents are kept; returns the exit code."""
    with user_input():
        opened = open_run(args)
        n_levels = len(opened.model.latent_shapes)
        subsets = args.keep or [list(range(first, n_levels)) for first in reversed(range(n_levels))]
        for kept in subsets:
            inside = all(0 <= level < n_levels for level in kept)
            expect(inside, "keep", f"levels in 0..{n_levels - 1} (0 the shallowest)", " ".join(map(str, kept)))
        out = output(args, ".png", own_name(opened), args.data)
        images, _, _, part = select(opened, args.data, args.part)
        indices = random_subset(args.seed, len(images), min(args.n, len(images)))
    _, x, y = _read(opened, images, indices)
    how = "the mean of their priors" if args.temperature == 0 else f"drawn at temperature {args.temperature:g}"
    say(f"{len(x)} images of {images.name}, {part}; levels that are not kept are {how}. RMSE (pixels 0 to 1):")
    rows = [("original", x)]
    for kept in subsets:
        noise = torch.Generator(x.device).manual_seed(derive(args.seed, "levels"))  # the same for every subset
        found = latents.keep_levels(opened.model, x, kept, args.temperature, y, generator=noise)
        seen, truth = (image.double().nan_to_num(0.0).clamp(-0.5, 0.5) for image in (found, x))
        error = Moments.of((seen - truth).square().flatten(1).mean(1).sqrt())
        spread = f" ± {error.standard_error:.4f}" if len(x) > 1 else ""
        rows.append((_words(sorted(set(kept)), n_levels), found))
        say(f"  {rows[-1][0]}: {error.mean:.4f}{spread}{not_finite_note(count_not_finite(found))}")
    names = [name_of(images, int(index)) for index in indices]
    _save(out, rows, opened, names, f"kept levels of {images.name}, {part}; the others: {how}", args.scale)
    say(f"picture: {out}")
    return 0


def _words(kept: list[int], n_levels: int) -> str:
    """A subset of levels for people."""
    if len(kept) == n_levels:
        return "all levels"
    if kept == [n_levels - 1]:
        return f"the deepest level ({kept[0]})"
    return f"level{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))}"


def _read(opened: OpenRun, images: Images, indices: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(pixels, x, y) of the images at ``indices``, in one batch."""
    pixels, labels = images.batch(indices)
    return (pixels, *inputs(pixels, labels, opened.n_bins, opened.model))


def _save(
    path: Path, rows: list[tuple[str, Tensor]], opened: OpenRun, columns: list[str], title: str, scale: int | None
) -> None:
    """Write rows of model outputs x (n, C, H, W) as a labelled grid."""
    shown = [(label, to_pixels(x, opened.n_bins).cpu()) for label, x in rows]
    save_grid(shown, opened.n_bins, path, columns, scale, title)
