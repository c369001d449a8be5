"""Edits: what they do to an image, what they say of it, and the pictures and commands that repeat them."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.edits import ByHand

from pyglow_fast.cli import main
from pyglow_fast.studio import (
    Add,
    Between,
    Draw,
    Edit,
    Edited,
    File,
    FileScore,
    Grid,
    HeldOut,
    Made,
    OpenRun,
    Picked,
    Subject,
    score_files,
)
from pyglow_fast.studio.scored import NAMED, made_csv, made_picture


def test_edits_as_words() -> None:
    """What changes nothing is left out; a slider's last digits are rounded away; a shift of pixels keeps no latents."""
    edit = Edit((Add("a", "rest", 0.1 + 0.2), Add("b", "c", 0.0)), (1.0, 0.1 + 0.2))
    assert edit.options() == ["--add", "a", "rest", "0.3", "--keep", "1", "0.3"]
    assert edit.options(pixel_shift=True) == ["--add", "a", "rest", "0.3"]
    assert not edit.is_none
    assert Edit((Add("b", "c", 1e-9),), (1.0, 1.0)).is_none


def test_a_subject_is_edited_many_times(emoji_run: Path) -> None:
    """Each edit starts from the image, and gives what the definition says; none gives the image."""
    opened, by_hand = OpenRun.open(str(emoji_run)), ByHand(emoji_run)
    subject = Subject(opened, opened.pick(HeldOut(1)), "noise")
    subject.edited(Edit((), (0.0, 0.0)))
    found = subject.edited(Edit((Add("Discs", "Squares", 1.0),), (0.5, 1.0)), pixel_shift=True)
    pixels, adds = by_hand.held(1)[0], [("Discs", "Squares", 1.0)]
    assert found.shifted is not None
    for shown, wanted in (
        (found.pixels, by_hand.edited(pixels, None, "noise", adds, (0.5, 1.0))),
        (found.shifted, by_hand.edited(pixels, None, "noise", adds, pixel_shift=True)),
    ):
        assert int((shown - wanted).abs().max()) <= 1  # what lies at the edge of a grey level is rounded either way
        assert float((shown != wanted).float().mean()) < 0.01
    assert torch.equal(subject.edited(Edit()).pixels, subject.pixels)
    with pytest.raises(ValueError, match=r"^keep: expected 2 shares, one a level, found 1$"):
        subject.edited(Edit((), (0.5,)))


def test_an_edit_that_leads_far_out_says_so(digits_run: Path) -> None:
    """In one sentence; an image like the training images has none, nor one that there is nothing to compare with."""
    opened = OpenRun.open(str(digits_run))
    subject = Subject(opened, opened.pick(HeldOut(0)), "latent")
    found = subject.edited(Edit())
    assert subject.outside(found, 1e9) == ""
    assert "not finite" in subject.outside(found._replace(finite=False), 1.0)
    opened.scores()
    assert subject.outside(found, subject.bits) == ""
    noise = 16 * torch.randint(2, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert subject.outside(Edited(noise, True, (), None), subject.bits_of(noise)).startswith("Far out: ")
    near, far = (subject.edited(Edit((Add("3", "rest", strength),))) for strength in (0.2, 9.0))
    assert (near.beyond, far.beyond) == ((), ("3",))
    assert subject.outside(far._replace(finite=True), 1.0).endswith(" so far along 3.")


def written(made: Made, name: str) -> Path:
    """The file that the shown command writes, which holds the same bytes."""
    _, *words = shlex.split(made.whole_command(name))
    assert main(words) == 0
    path = Path(words[-1])
    assert path.read_bytes() == made.data
    return path


def test_nothing_is_written_over_what_is_read(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an image has the name that is offered for what is made of it; and all pictures are large."""
    monkeypatch.chdir(tmp_path)
    opened, name = OpenRun.open(str(digits_run)), "-edit.png"
    Image.new("L", (20, 20), 50).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    picked = opened.pick(File(name))
    subject, other = Subject(opened, picked, "latent"), Subject(opened, opened.pick(HeldOut(0)), "latent")
    path, scores = Between(subject, other), score_files(opened, [picked])
    frames, _ = path.frames(3)
    for made in (
        subject.made(subject.pixels, Edit()),
        subject.made(subject.pixels, Edit(), scale=2),
        path.made(frames, ".png"),
        path.made_frame(path.frames(times=(0.25,))[0][0], 0.25),
    ):
        one = "--at" in made.command or made.command.startswith("pyglow-fast edit")
        large = max(Image.open(io.BytesIO(made.data)).size) >= 256
        assert large == ("--scale" not in made.command) or not one
        written(made, name)
    written(Grid(opened, Draw(4)).made(), "samples.png")
    written(path.made(frames, ".gif"), "path.gif")
    written(made_csv(opened, scores), "scores.csv")
    written(made_picture(opened, scores), name)
    assert (tmp_path / name).read_bytes() == before
    assert Grid(opened, Draw(1)).made().command.endswith("--seed 0")
    assert Grid(replace(opened, device="cpu"), Draw(1)).made().command.endswith("--seed 0 --device cpu")


def test_many_marks_have_numbers_alone(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image has its name, some have number and name, of which there is no room for many."""
    found: list[list[str]] = []
    monkeypatch.setattr("pyglow_fast.studio.scored.histogram_png", lambda *args: found.append([*args[2]]) or b"")
    score = FileScore(Picked(torch.zeros(1, 8, 8), 0, HeldOut(7)), 2.0, 0.5)
    for count in (1, 2, NAMED + 1):
        made_picture(OpenRun.open(str(digits_run)), [score] * count)
    one, two, many = found
    assert (one, two) == (["held-out image 7"], ["1 held-out image 7", "2 held-out image 7"])
    assert many == [str(i + 1) for i in range(NAMED + 1)]
