"""The commands that look at a run draw what the latents API gives, and say what they did."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from support.edits import ByHand, assert_repeatable, rgb_of
from support.latent_runs import made, train, write_emoji
from support.program import done, pyglow_fast

from pyglow_fast import Glow
from pyglow_fast.app.cli import main
from pyglow_fast.latents import edited, interpolate
from pyglow_fast.train import to_pixels
from pyglow_fast.train.figures import grid, image_picture


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two levels: on emoji, "emoji run", and on labelled digits, "digits"."""
    return made(tmp_path_factory)


Adds = list[tuple[str, str, float]]
EDITS: list[tuple[str, Adds, list[float], list[str]]] = [
    ("emoji run", [("Discs", "rest", 1.0)], [], []),
    ("emoji run", [("Squares", "Discs", -0.5)], [0.5, 1.0], []),
    ("digits", [("3", "8", 1.0), ("1", "rest", -0.5)], [1.0, 0.5], []),
    ("digits", [("9", "4", 0.5)], [0.25, 0.5], ["--label", "4"]),
]


@pytest.mark.parametrize(("run", "adds", "keep", "options"), EDITS)
def test_edit(place: Path, tmp_path: Path, run: str, adds: Adds, keep: list[float], options: list[str]) -> None:
    """As the latents API gives it, under the image's class or another; of a model with classes latents are edited."""
    by_hand, out = ByHand(place / run), tmp_path / "x.png"
    words = [str(word) for add in adds for word in ("--add", *add)] + (["--keep", *map(str, keep)] if keep else [])
    assert main(["edit", str(place / run), "2", *words, *options, "--out", str(out)]) == 0
    pixels, label = by_hand.held(2)
    wanted = by_hand.edited(pixels, int(options[1]) if options else label, adds, keep or None)
    assert np.array_equal(rgb_of(out), image_picture(wanted, by_hand.n_bins).permute(1, 2, 0).numpy())
    assert not torch.equal(wanted, pixels)
    assert_repeatable(out)


def test_what_edit_says(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits/dim before and after; the former are those that score gives. What is not finite is grey, and said."""
    run, out = place / "digits", tmp_path / "x.png"
    before, after, *_, picture = done("edit", run, 0, "--add", 3, "rest", 1, "--out", out).splitlines()
    assert re.fullmatch(r"before: (\d\.\d{3}) bits/dim, more than (\d+\.\d)% of 180 held-out images", before)
    assert after.startswith("after: ")
    assert picture == f"picture: {out}"
    assert done("score", run, 0, "--out", tmp_path / "x.csv").splitlines()[1] == before.replace("before", "  0")
    blank = torch.full((1, 1, 8, 8), torch.nan)
    monkeypatch.setattr("pyglow_fast.app.studio.edits.edited", lambda model, z, *rest: blank)
    assert "note: " in done("edit", run, 0, "--keep", 0.5, 1, "--scale", 1, "--out", out)
    assert np.ptp(rgb_of(out)) == 0
    encode = Glow.encode
    monkeypatch.setattr(Glow, "encode", lambda *args: [z * torch.inf for z in encode(*args)])
    ended = pyglow_fast("edit", run, 0, "--out", tmp_path / "y.png")
    assert (ended.code, ended.err[:52]) == (2, "error: image: expected one whose latents are finite,")
    assert not (tmp_path / "y.png").exists()


def test_samples_that_explode_are_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are given, at each temperature."""
    sample, out = Glow.sample, tmp_path / "x.png"

    def exploding(model: Glow, n: int, temperature: float, **options: Any) -> torch.Tensor:
        x = sample(model, n, temperature, **options)
        x[[1, 3]] = torch.tensor([math.nan, math.inf]).view(2, 1, 1, 1) if temperature > 0.9 else x[[1, 3]]
        return x

    monkeypatch.setattr(Glow, "sample", exploding)
    lines = done("sample", place / "digits", "--n", 5, "--temperature", 0.5, 1, "--out", out).splitlines()
    assert lines[0] == f"5 samples at temperature 0.5, 1: {out}"
    assert lines[1].startswith("2 of them at 1 are not finite, as the inverse explodes there")
    assert lines[1].endswith("shown grey: 1, 3 (from 0); try --temperature 0.8")
    assert np.ptp(rgb_of(out)) > 0


def test_without_the_images_of_the_run(place: Path, tmp_path: Path) -> None:
    """Samples and files can be edited, attributes where they were measured before; else it is said in one line."""
    images, run, out = tmp_path / "emoji", tmp_path / "run", tmp_path / "x.png"
    write_emoji(images)
    train(f"emoji:{images}", run, "--size", "16", "--n-levels", "1")
    add = ["edit", run, "sample:1", "--add", "Discs", "rest", 1, "--out", out]
    done(*add)
    before = out.read_bytes()
    shutil.move(images, tmp_path / "elsewhere")
    assert "% of " in done(*add)  # the scores were kept too
    assert out.read_bytes() == before
    shutil.rmtree(run / "cache")
    assert re.fullmatch(r"before: [\d.]+ bits/dim\nafter: [\d.]+ bits/dim\n.*", done(*add[:3], *add[-2:]), re.S)
    for command in (add, ["edit", run, "0"], ["levels", run], ["evaluate", run]):
        ended = pyglow_fast(*command)
        assert (ended.code, ended.err[:7]) == (2, "error: ")
        assert str(images) in ended.err


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("run", "space"), [("emoji run", "noise"), ("digits", "latent")])
def test_interpolate(place: Path, tmp_path: Path, run: str, space: str, spherical: bool) -> None:
    """The frames are as the latents API gives them; both ends are the images; one of them is the same alone."""
    by_hand, out = ByHand(place / run), tmp_path / "x.png"
    ends = [by_hand.held(number) for number in (1, 4)]
    a, b = (by_hand.x(pixels[None]) for pixels, _ in ends)
    first, last = (by_hand.y(None if label is None else torch.tensor([label])) for _, label in ends)
    options = ["--spherical"] if spherical else []
    command = ["interpolate", str(place / run), "--from", "1", "--to", "4", "--out", str(out), *options]
    assert main([*command, "--frames", "5", "--scale", "2"]) == 0
    pixels = to_pixels(interpolate(by_hand.model, a, b, 5, spherical, space, (first, last))[0], by_hand.n_bins)
    assert np.array_equal(rgb_of(out), grid(pixels, by_hand.n_bins, 5, 2).permute(1, 2, 0).numpy())
    assert all(torch.equal(found, own) for found, (own, _) in zip(pixels[[0, -1]], ends, strict=True))
    assert_repeatable(out)
    assert main([*command, "--at", "0.25"]) == 0
    assert np.array_equal(rgb_of(out), image_picture(pixels[1], by_hand.n_bins).permute(1, 2, 0).numpy())
    assert_repeatable(out)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_holds_its_command(place: Path, tmp_path: Path, suffix: str) -> None:
    out, again = tmp_path / f"x.{suffix}", tmp_path / f"again.{suffix}"
    command = ["interpolate", str(place / "digits"), "--from", "0", "--to", "sample:3:n=4:seed=1", "--frames", "4"]
    assert main([*command, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert len(list(ImageSequence.Iterator(picture))) == 6  # there and back again
        held = picture.info["comment"] if suffix == "gif" else picture.info["xmp"]
    found = re.search("Command: pyglow-fast (.*?)(?:</rdf:li>|$)", held.decode())
    assert main([*shlex.split(found[1]), "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_several_paths(place: Path, tmp_path: Path) -> None:
    """Random ones, that the seed decides."""
    drawn = []
    for seed in (1, 1, 2):
        done("interpolate", place / "digits", "--frames", 2, "--seed", seed, "--out", tmp_path / "y.png")
        drawn.append((tmp_path / "y.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_levels(place: Path, tmp_path: Path) -> None:
    """The error that is told is that of the images that are shown."""
    by_hand = ByHand(place / "emoji run")
    text = done("levels", place / "emoji run", "--n", 100, "--out", tmp_path / "x.png")
    found = {name: float(value) for name, value in re.findall(r"^  ([^:]+): ([\d.]+)", text, re.MULTILINE)}
    assert found["all levels"] == 0
    x = by_hand.x(by_hand.data.batch(by_hand.held_out)[0])
    kept = edited(by_hand.model, by_hand.model.encode(x), None, [0, 1], "latent").clamp(-0.5, 0.5)
    error = (kept - x).square().flatten(1).mean(1).sqrt().mean()
    assert found["the deepest level (1)"] == pytest.approx(float(error), abs=1e-4)
    text = done("levels", place / "emoji run", "--keep", 0, "--keep", 1, 0, "--out", tmp_path / "x.png")
    assert re.findall(r"^  ([^:]+):", text, re.MULTILINE) == ["level 0", "all levels"]
