"""Runs ``pyglow-fast edit``: one image, moved along directions of attributes and towards the means of the priors."""

from __future__ import annotations

import argparse

import torch

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import (
    add_run,
    check_counts,
    number,
    open_to_look,
    picture_path,
    progress_bar,
    say,
    user_input,
    whole,
    write_made,
)
from pyglow_fast.latents import SPACES
from pyglow_fast.studio.directions import REST, Add
from pyglow_fast.studio.edits import Edit, Subject, likelihood_text
from pyglow_fast.studio.opened import TRAIN_IMAGES
from pyglow_fast.studio.words import IMAGE_HELP, parse_image


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``edit`` and its options."""
    about = "edit one image: add attributes, keep a share of each level's latents"
    parser = commands.add_parser("edit", help=about, description=about)
    parser.set_defaults(run_command=run)
    add_run(parser)
    parser.add_argument("image", metavar="IMAGE", help=f"{IMAGE_HELP}; a file is cropped and scaled as in training")
    text = (
        "S times the way from the mean latent of MINUS to that of PLUS, each a class or attribute of the run's images; "
        f"MINUS may be {REST}, those without PLUS; may be repeated."
    )
    parser.add_argument("--add", nargs=3, action="append", metavar=("PLUS", "MINUS", "S"), help=text)
    parser.add_argument(
        "--keep",
        type=number,
        nargs="+",
        metavar="SHARE",
        help="the share of the image's own latents that each level keeps, 0 to 1, the shallowest first (default: all)",
    )
    parser.add_argument(
        "--space",
        choices=SPACES,
        help="what is edited (default: noise; for a model with classes latent, since noise holds little of the class)",
    )
    parser.add_argument(
        "--label", metavar="CLASS", help="the image's class (default: its own; of a file the likeliest)"
    )
    parser.add_argument(
        "--pixel-shift", action="store_true", help="instead add the differences of the mean pixels to the pixels"
    )
    add_train_images(parser)
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture to write")
    parser.add_argument(
        "--scale", type=whole, metavar="N", help="enlarge each pixel by this factor (default: to 256 pixels)"
    )


def add_train_images(parser: argparse.ArgumentParser) -> None:
    """Declare --train-images, how many training images attributes are measured on."""
    text = "training images that the mean latents are measured on, at most"
    parser.add_argument("--train-images", type=whole, metavar="N", default=TRAIN_IMAGES, help=text)


def adds_of(given: list[list[str]] | None) -> tuple[Add, ...]:
    """Read the attributes and strengths that --add names.

    Raises:
        ValueError: a strength that is no finite number.
    """
    found = []
    for plus, minus, text in given or ():
        try:
            strength = float(text)
        except ValueError:
            raise ValueError(f"add: expected a number as the third word, found {text!r}") from None
        expect(abs(strength) < float("inf"), "add", "a finite number as the third word", text)
        found.append(Add(plus, minus, strength))
    return tuple(found)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Edit the image; returns the exit code."""
    with user_input():
        check_counts(args, "scale")
        edit = Edit(adds_of(args.add), tuple(args.keep or ()))
        for share in edit.keep:
            expect(0.0 <= share <= 1.0, "keep", "shares in 0..1", share)
        expect(not (args.keep and args.pixel_shift), "keep", "no such option beside --pixel-shift", args.keep)
        image = parse_image(args.image)
        opened = open_to_look(args)
        out = picture_path(args.out, opened.checkpoint.config.data.name, image.text)
        space = args.space or opened.space
        picked = opened.pick(image, None if args.label is None else opened.label(args.label))
        expect(
            len(edit.keep) in (0, len(opened.model.latent_shapes)),
            "keep",
            f"{len(opened.model.latent_shapes)} shares, one a level",
            len(edit.keep),
        )
        with progress_bar("mean latents") as progress:
            opened.directions(space, progress).shift(edit.adds)
        subject = Subject(opened, picked, space)
    found = subject.edited(edit, args.pixel_shift)
    shown = found.pixels if found.shifted is None else found.shifted
    write_made(subject.made(shown, edit, args.pixel_shift, args.scale), out)
    if not found.finite and not args.pixel_shift:
        say("note: parts of the edit are not finite, shown grey: it leads out of the model's range")
    with progress_bar("bits/dim of the run's images") as progress:
        for name, pixels in (("before", subject.pixels), ("after", shown)):
            say(f"{name}: {likelihood_text(opened, opened.bits(pixels, picked.label), progress)}")
    say(f"picture: {out}")
    return 0
