"""Runs the commands that look at a run: sample, interpolate, edit, manipulate, levels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pyglow_fast import latents
from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import write_bytes
from pyglow_fast._core.moments import Moments
from pyglow_fast.app.cli._arguments import COUNT, IMAGES, PICTURE, RUN, Commands, command, open_run
from pyglow_fast.app.cli._output import not_finite_note, say, say_next, user_input
from pyglow_fast.app.studio import Add, Between, Draw, Edit, Grid, Picked, Subject, likelihood_text, parse_image
from pyglow_fast.app.studio.directions import REST
from pyglow_fast.app.studio.edits import ANIMATED
from pyglow_fast.app.studio.reading import inputs, name_of
from pyglow_fast.app.studio.words import IMAGE_HELP, TEMPERATURE, HeldOut, Image, N, shown_name
from pyglow_fast.latents.paths import even
from pyglow_fast.likelihood import not_finite
from pyglow_fast.train import save_grid, to_pixels
from pyglow_fast.train.seeds import derive, random_subset

PAIRS, FRAMES = 4, 8
FEW = 8  # samples at each of several temperatures, by themselves
STRENGTHS = [-2.0, -1.0, 0.0, 1.0, 2.0]
NUMBERS: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "X"}
WHOLE: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "I"}


def add(commands: Commands[Any]) -> None:
    """Declare the commands and their options."""
    every: tuple[str, ...] = (*RUN, *PICTURE, "--n", "--seed", "--label", "--columns")
    parser = command(commands, sample, "sample runs/demo --n 40 --temperature 0.7", *every)
    text = "what multiplies the priors' deviation; 0 is the mean; of several each has a row, of the same noise"
    parser.add_argument("--temperature", default=[TEMPERATURE], help=text, **NUMBERS)

    example = "interpolate runs/demo --from 0 --to 9 --out path.gif"
    parser = command(commands, interpolate, example, *RUN, *PICTURE, "--seed")
    text = f"from here, to a PNG, GIF or WEBP (there and back again); may be repeated (default: {PAIRS} random paths): "
    parser.add_argument("--from", dest="first", metavar="IMAGE", action="append", help=text + IMAGE_HELP)
    parser.add_argument("--to", dest="second", metavar="IMAGE", action="append", help="and to here")
    parser.add_argument("--at", type=float, metavar="T", help="of one path: the one frame at T, from 0 to 1")
    parser.add_argument("--frames", default=FRAMES, help="images on each path, both ends too", **COUNT)
    parser.add_argument("--spherical", action="store_true", help="on great circles, level by level, not straight")

    parser = command(commands, edit, "edit runs/demo 0 --add 3 rest 1", *RUN, *PICTURE)
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

    every = (*IMAGES, *PICTURE, "--n", "--seed")
    parser = command(commands, manipulate, "manipulate runs/demo --plus 3 --minus 8", *every, defaults={"n": 8})
    text = "a class or attribute of the run's images"
    parser.add_argument("--plus", metavar="NAME", required=True, help=f"{text}, which is added")
    parser.add_argument("--minus", metavar="NAME", default=REST, help=f"{text} to begin from; {REST}: all without PLUS")
    parser.add_argument("--strengths", default=STRENGTHS, help="multiples of the difference of the means", **NUMBERS)

    parser = command(commands, levels, "levels runs/demo --n 6", *every, defaults={"n": 8})
    text = "levels that are kept, 0 the shallowest; may be repeated (default: the deepest, the deepest two, ...)"
    parser.add_argument("--keep", action="append", help=text, **WHOLE)


def sample(args: argparse.Namespace) -> None:
    """Draw images from a trained model."""
    with user_input():
        opened, out = open_run(args, ".png")
        several = len(args.temperature) > 1
        expect(not (several and args.columns), "columns", "no such option with several temperatures", args.columns)
        n, labels = args.n or (FEW if several else N), tuple(map(opened.label, args.label or ()))
        grids = [Grid(opened, Draw(n, value, args.seed, labels)) for value in args.temperature]
    if several:
        y = grids[0].drawn.labels
        columns = [] if y is None else [opened.classes[label] for label in y.tolist()]
        rows = [(f"T = {grid.draw.temperature:g}", grid.drawn.pixels) for grid in grids]
        save_grid(rows, opened.n_bins, out, columns, args.scale, f"{args.run}: samples of the same noise")
    else:
        write_bytes(out, grids[0].made(args.columns, args.scale).data)
    say(f"{n} samples at temperature {', '.join(f'{value:g}' for value in args.temperature)}: {out}")
    for grid in grids:
        if bad := grid.drawn.not_finite:
            numbers, lower = ", ".join(map(str, bad)), 0.8 * grid.draw.temperature
            say(
                f"{len(bad)} of them at {grid.draw.temperature:g} are not finite, as the inverse explodes there, and "
                f"shown grey: {numbers} (from 0); try --temperature {lower:.2g}"
            )
    say_next("serve", args.run)


def interpolate(args: argparse.Namespace) -> None:
    """Go from image to image through the latents."""
    with user_input():
        firsts: Sequence[Image] = [parse_image(text, "from") for text in args.first or ()]
        lasts: Sequence[Image] = [parse_image(text, "to") for text in args.second or ()]
        pairs = len(firsts)
        expect(len(lasts) == pairs, "to", f"{pairs} images, one for each --from", len(lasts))
        fits = args.at is None or (pairs == 1 and 0.0 <= args.at <= 1.0)
        expect(fits, "at", "a number in 0..1, of one path", args.at)
        suffix = Path(args.out or ".").suffix.lower()
        suffix = suffix if pairs == 1 and args.at is None and suffix in ANIMATED else ".png"
        opened, out = open_run(args, suffix, *(image.text for image in (*firsts, *lasts)))
        if not pairs:
            count = len(opened.images()[2])
            expect(count >= 2, "run", "two held-out images", count)
            generator = torch.Generator().manual_seed(derive(args.seed, "pairs"))
            order = torch.randperm(count, generator=generator)[: 2 * PAIRS].tolist()
            firsts, lasts = ([HeldOut(number) for number in order[side::2]] for side in (0, 1))
        rows, changed, bad = [], 0, 0
        for names in zip(firsts, lasts, strict=False):
            first, last = (Subject(opened, opened.pick(name)) for name in names)
            path = Between(first, last, args.spherical)
            frames, ruined = path.frames(even(args.frames) if args.at is None else [args.at])
            changed += int((frames[[0, -1]] != torch.stack([first.pixels, last.pixels])).sum())
            bad += ruined
            rows.append(("\n→ ".join(map(shown_name, names)), frames))
    how = f"{'spherical' if args.spherical else 'linear'} path{'s' if len(rows) > 1 else ''} in {opened.space} space"
    if len(rows) == 1:
        write_bytes(out, path.made(frames, args.at, suffix, args.scale).data)
    else:
        save_grid(rows, opened.n_bins, out, [f"{t:.2g}" for t in even(args.frames)], args.scale, f"{args.run}: {how}")
    if args.at is None:
        say(f"{len(rows)} {how}{not_finite_note(bad, 'images')}, {changed} grey levels changed at both ends: {out}")
    else:
        say(f"the image at {args.at:g} of a {how}{not_finite_note(bad)}: {out}")


def edit(args: argparse.Namespace) -> None:
    """Edit one image: add attributes, keep a share of each level's latents."""
    with user_input():
        adds = tuple(Add(plus, minus, _strength(text)) for plus, minus, text in args.add or ())
        changed = Edit(adds, tuple(args.keep or ()))
        image = parse_image(args.image)
        opened, out = open_run(args, ".png", image.text)
        subject = Subject(opened, opened.pick(image, None if args.label is None else opened.label(args.label)))
        found = subject.edited(changed)
    write_bytes(out, subject.made(found.pixels, changed, args.scale).data)
    after = subject.bits_of(found.pixels)
    for name, bits in (("before", subject.bits), ("after", after)):
        say(f"{name}: {likelihood_text(opened, bits)}")
    outside = subject.outside(found, after)
    if outside:
        say(f"note: {outside}")
    say(f"picture: {out}")


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"add: expected a number as the third word, found {text!r}") from None


def manipulate(args: argparse.Namespace) -> None:
    """Add an attribute to images at several strengths, along the difference of mean latents of training images."""
    with user_input():
        opened, out = open_run(args, ".png", args.data)
        images, _, _, part = opened.select(args.data, args.part)
        rows, bad = [], 0
        for index in random_subset(args.seed, len(images), min(args.n, len(images))).tolist():
            pixels, labels = images.batch(torch.tensor([index]))
            label = int(labels[0]) if labels is not None and opened.classes else None
            subject = Subject(opened, Picked(pixels[0], label, HeldOut(index)))
            edits = [subject.edited(Edit((Add(args.plus, args.minus, strength),))) for strength in args.strengths]
            bad += sum(not found.finite for found in edits)
            row = [subject.pixels, *(found.pixels for found in edits)]
            rows.append((name_of(images, index), torch.stack(row)))
    what = f"{args.plus} minus {args.minus}, {opened.space} space"
    save_grid(rows, opened.n_bins, out, ["image", *(f"{value:+g}" for value in args.strengths)], args.scale, what)
    note = not_finite_note(bad, "edits")
    say(f"{what}: {len(rows)} {part} images of {images.name}, {len(args.strengths)} strengths{note}: {out}")
    say_next("edit", args.run, "0", "--add", args.plus, args.minus, "1")


@torch.no_grad()
def levels(args: argparse.Namespace) -> None:
    """Reconstruct images from some levels of their latents, the others at the mean of their priors."""
    with user_input():
        opened, out = open_run(args, ".png", args.data)
        model, n_levels = opened.model, len(opened.model.latent_shapes)
        subsets = args.keep or [list(range(first, n_levels)) for first in reversed(range(n_levels))]
        for kept in subsets:
            inside = all(0 <= level < n_levels for level in kept)
            expect(inside, "keep", f"levels in 0..{n_levels - 1} (0 the shallowest)", " ".join(map(str, kept)))
        images, _, _, part = opened.select(args.data, args.part)
        indices = images.without_skipped(random_subset(args.seed, len(images), min(args.n, len(images))))
        pixels, labels = images.batch(indices)
        x, y = inputs(pixels, labels, opened.n_bins, model)
    how = "levels that are not kept are the mean of their priors"
    say(f"{len(x)} images of {images.name}, {part}; {how}. RMSE (pixels 0 to 1):")
    rows, z = [("original", pixels.long())], latents.to_space(model, x, "latent", y)
    for kept in subsets:
        found = latents.edited(model, z, None, [float(level in kept) for level in range(n_levels)], "latent", y)
        seen, truth = (image.double().nan_to_num(0.0).clamp(-0.5, 0.5) for image in (found, x))
        error = Moments.of((seen - truth).square().flatten(1).mean(1).sqrt())
        spread = f" ± {error.standard_error:.4f}" if len(x) > 1 else ""
        rows.append((_words(sorted(set(kept)), n_levels), to_pixels(found, opened.n_bins).cpu()))
        changed = int((rows[-1][1] != rows[0][1]).sum())
        exact = f", {changed} of {pixels.numel()} grey levels changed" if len(set(kept)) == n_levels else ""
        say(f"  {rows[-1][0]}: {error.mean:.4f}{spread}{exact}{not_finite_note(len(not_finite(found)))}")
    names = [name_of(images, int(index)) for index in indices]
    save_grid(rows, opened.n_bins, out, names, args.scale, f"{images.name}, {part}: {how}")
    say(f"picture: {out}")


def _words(kept: list[int], n_levels: int) -> str:
    if len(kept) == n_levels:
        return "all levels"
    if kept == [n_levels - 1]:
        return f"the deepest level ({kept[0]})"
    return f"level{'s' if len(kept) > 1 else ''} {', '.join(map(str, kept))}"
