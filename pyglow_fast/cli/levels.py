"""Runs ``pyglow-fast levels``: shows what is left of images when only some levels of their latents are kept."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import add_run, open_run, picture_path, say, stream, user_input, whole
from pyglow_fast.cli._images import add_images, images_of
from pyglow_fast.cli._latents import add_picture, add_temperature, check_options, chosen, not_finite_note, read, save
from pyglow_fast.latents import keep_levels, mean_and_error, rmse
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.studio.reading import inputs, name_of
from pyglow_fast.train import derive


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``levels`` and its options."""
    about = "reconstruct images from some levels of their latents, the others drawn from their priors"
    parser = commands.add_parser("levels", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    add_images(parser)
    parser.add_argument("--n", type=whole, metavar="N", default=8, help="images")
    parser.add_argument(
        "--keep",
        type=whole,
        nargs="+",
        action="append",
        metavar="L",
        help="levels that are kept, 0 the shallowest; may be repeated (default: the deepest, the deepest two, ...)",
    )
    add_temperature(parser, 0.0, "of the levels that are drawn; 0 is the mean of their priors")
    add_picture(parser, "which images, and of the noise")


def subsets_of(keep: list[list[int]] | None, n_levels: int) -> list[list[int]]:
    """Read the levels that each row keeps.

    Raises:
        ValueError: a level that the model does not have.
    """
    if keep is None:
        return [list(range(first, n_levels)) for first in reversed(range(n_levels))]
    for levels in keep:
        text = " ".join(map(str, levels))
        inside = all(0 <= level < n_levels for level in levels)
        expect(inside, "keep", f"levels in 0..{n_levels - 1} (0 the shallowest)", text)
    return [sorted(set(levels)) for levels in keep]


def words(levels: list[int], n_levels: int) -> str:
    """Write a subset of levels for people."""
    if len(levels) == n_levels:
        return "all levels"
    if levels == [n_levels - 1]:
        return f"the deepest level ({levels[0]})"
    return f"level{'s' if len(levels) > 1 else ''} {', '.join(map(str, levels))}"


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Reconstruct the images; returns the exit code."""
    with user_input():
        check_options(args, "n")
        out = picture_path(args.out, args.data)
        _, checkpoint, model = open_run(args)
        n_levels = len(model.latent_shapes)
        subsets = subsets_of(args.keep, n_levels)
        images, _, part = images_of(args, checkpoint, model)
        indices = chosen(images, args.n, args.seed)
    originals: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in subsets]
    for part_number, (pixels, labels) in enumerate(read(images, indices)):
        x, y = inputs(pixels, labels, images.n_bins, model)
        originals.append(x)
        for found, levels in zip(kept, subsets, strict=True):
            noise = stream(x.device, derive(args.seed, "levels", part_number))  # the same for every subset
            found.append(keep_levels(model, x, levels, args.temperature, y, generator=noise))
    truth = torch.cat(originals)
    rows, columns = [("original", truth)], [name_of(images, int(index)) for index in indices]
    drawn = "the mean of their priors" if args.temperature == 0 else f"drawn at temperature {args.temperature:g}"
    say(f"{len(truth)} images of {images.name}, {part}; levels that are not kept are {drawn}. RMSE (pixels 0 to 1):")
    for levels, parts in zip(subsets, kept, strict=True):
        x, label = torch.cat(parts), words(levels, n_levels)
        mean, error = mean_and_error(rmse(x, truth))
        spread = f" ± {error:.4f}" if len(x) > 1 else ""
        say(f"  {label}: {mean:.4f}{spread}{not_finite_note(count_not_finite(x))}")
        rows.append((label, x))
    save(out, rows, images.n_bins, columns, f"kept levels of {images.name}, {part}; the others: {drawn}", args.scale)
    say(f"picture: {out}")
    return 0
