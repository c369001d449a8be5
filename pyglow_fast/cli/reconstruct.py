"""Runs ``pyglow-fast reconstruct``: images, and what comes back when they are encoded and decoded."""

from __future__ import annotations

import argparse

import torch

from pyglow_fast.cli._common import add_run, check_counts, open_run, picture_path, say, user_input, whole
from pyglow_fast.cli._images import add_images, images_of
from pyglow_fast.studio.reading import middles
from pyglow_fast.train import save_grid, to_pixels


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``reconstruct`` and its options."""
    about = "encode and decode images; print the error"
    parser = commands.add_parser("reconstruct", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    add_images(parser)
    parser.add_argument(
        "--out", required=True, metavar="PNG", help="the picture: originals above their reconstructions"
    )
    parser.add_argument("--n", type=whole, metavar="N", default=16, help="at most so many images")


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Reconstruct the images; returns the exit code."""
    with user_input():
        check_counts(args, "n")
        out = picture_path(args.out, args.data)
        _, checkpoint, model = open_run(args)
        images, _, part = images_of(args, checkpoint, model)
        pixels, _ = images.batch(torch.arange(min(args.n, len(images))))
    x = middles(pixels, images.n_bins, model)
    back = model.decode(model.encode(x))
    error = float((back - x).abs().max())
    found = to_pixels(back, images.n_bins).cpu()
    changed = int((found != pixels).sum())
    columns = min(len(pixels), 16)
    rows = [
        picture[first : first + columns]
        for first in range(0, len(pixels), columns)
        for picture in (pixels.long(), found)
    ]
    # Every row but the last pair is full; blank images keep originals and reconstructions in line.
    padded = [torch.cat([row, row.new_zeros(columns - len(row), *row.shape[1:])]) for row in rows]
    save_grid(torch.cat(padded), images.n_bins, out, columns)
    say(
        f"{len(pixels)} images of {images.name}, {part}: max |decode(encode(x)) - x| = {error:.3g} "
        f"({error * images.n_bins:.2g} grey levels), {changed} of {pixels.numel()} grey levels changed: {out}"
    )
    return 0
