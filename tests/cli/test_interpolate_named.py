"""``pyglow-fast interpolate --from A --to B``: frames, strip and animations, which repeat by the command they hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from support.edits import ByHand, assert_repeatable, rgb_of
from support.odd_names import CLASSES, FILES, train_several, write_odd_files

from pyglow_fast.cli import main
from pyglow_fast.latents import interpolate
from pyglow_fast.train import to_pixels
from pyglow_fast.train.figures import grid, image_picture

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on emoji, on labelled digits, and on images whose classes have odd names."""
    root = tmp_path_factory.mktemp("paths")
    train_several(root, "it's $odd")
    return root


def path(run: Path, first: str, last: str, out: Path, *options: str) -> None:
    assert main(["interpolate", str(run), "--from", first, "--to", last, "--out", str(out), *options]) == 0


def told(out: Path) -> list[str]:
    """The words of the command that an animation holds, without the program's name."""
    with Image.open(out) as picture:
        if out.suffix == ".gif":
            text = picture.info["comment"].decode()
        else:
            found = re.search("<rdf:li[^>]*>(.*?)</rdf:li>", picture.info["xmp"].decode(), re.DOTALL)
            assert found is not None
            text = found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    program, *words = shlex.split(text.removeprefix("Command: "))
    assert program == "pyglow-fast"
    return words


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("run", "space"), [("emoji run", "noise"), ("digits", "latent"), ("digits", "noise")])
def test_the_frames(place: Path, tmp_path: Path, run: str, space: str, spherical: bool) -> None:
    """As the latents API gives them; both ends are the images."""
    by_hand, out = ByHand(place / run), tmp_path / "x.png"
    ends = [by_hand.held(number) for number in (1, 4)]
    a, b = (by_hand.x(pixels[None]) for pixels, _ in ends)
    first, last = (by_hand.y(None if label is None else torch.tensor([label])) for _, label in ends)
    default = space == ("latent" if run == "digits" else "noise")
    options = [*(["--spherical"] if spherical else []), *([] if default else ["--space", space])]
    path(place / run, "1", "4", out, "--frames", "5", "--scale", "2", *options)
    with torch.no_grad():
        x = interpolate(by_hand.model, a, b, 5, spherical, space, (first, last))[0]
    pixels = to_pixels(x, by_hand.n_bins)
    wanted = grid(pixels, by_hand.n_bins, 5, 2).permute(1, 2, 0).numpy()
    assert np.array_equal(rgb_of(out), wanted)
    for end, (own, _) in zip((pixels[0], pixels[-1]), ends, strict=True):
        assert torch.equal(end, own)
    assert_repeatable(out)
    path(place / run, "1", "4", out, "--at", "0.25", *options)
    frame = image_picture(pixels[1], by_hand.n_bins).permute(1, 2, 0).numpy()
    assert np.array_equal(rgb_of(out), frame)  # of five the second
    assert_repeatable(out)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("run", ["emoji run", "it's $odd"])
def test_animations(place: Path, tmp_path: Path, run: str, suffix: str) -> None:
    """There and back again; the command in the file gives the same bytes."""
    out = tmp_path / f"x{suffix}"
    path(place / run, "0", "sample:3:n=4:seed=1:temperature=0.9", out, "--frames", "4", "--scale", "3")
    words = told(out)
    again = tmp_path / f"again{suffix}"
    assert main([*words, "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    strip = tmp_path / "x.png"
    path(place / run, "0", "sample:3:n=4:seed=1:temperature=0.9", strip, "--frames", "4", "--scale", "1")
    side = 16 if run == "emoji run" else 8
    with Image.open(out) as picture:
        frames = [np.asarray(frame.convert("RGB"))[1::3, 1::3] for frame in ImageSequence.Iterator(picture)]
    shown = rgb_of(strip)
    wanted = [shown[2 : 2 + side, 2 + i * (side + 2) : 2 + i * (side + 2) + side] for i in (0, 1, 2, 3, 2, 1)]
    if suffix == ".webp" or run != "emoji run":  # a GIF has 256 colours
        assert len(frames) == len(wanted)
        assert all(np.array_equal(frame, image) for frame, image in zip(frames, wanted, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("k", range(len(CLASSES)))
def test_odd_names(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    monkeypatch.chdir(tmp_path)
    write_odd_files(tmp_path)
    out = tmp_path / "x.png"
    labels = [f"\\{name}" if name[0] in "-\\" else name for name in (CLASSES[k], CLASSES[k - 1])]
    for options in ([], ["--at", "0.123456789"]):
        path(place / "it's $odd", FILES[k], FILES[-1 - k], out, "--labels", *labels, *options)
        words = assert_repeatable(out)
        assert words[words.index("--labels") + 1 :][:2] == labels
        assert not options or words[words.index("--at") + 1] == "0.123456789"
    path(place / "it's $odd", FILES[-1 - k], "0", tmp_path / "x.gif")
    words = told(tmp_path / "x.gif")
    assert main([*words, "--out", "again.gif"]) == 0
    assert Path("again.gif").read_bytes() == Path("x.gif").read_bytes()
