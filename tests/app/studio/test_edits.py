"""Edits: what they do to an image, what they say of it, and the pictures and commands that repeat them."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pyglow_fast.app.cli import main
from pyglow_fast.app.studio import (
    Add,
    Between,
    Draw,
    Edit,
    Edited,
    File,
    Grid,
    HeldOut,
    Made,
    OpenRun,
    Subject,
    score_files,
)
from pyglow_fast.app.studio.pictures import made_csv, made_picture


def test_edits_are_rounded() -> None:
    """What changes nothing is left out; a slider's last digits are rounded away."""
    edit = Edit((Add("a", "rest", 0.1 + 0.2), Add("b", "c", 0.0)), (1.0, 0.1 + 0.2))
    assert (edit.adds, edit.keep) == ((Add("a", "rest", 0.3),), (1.0, 0.3))
    assert not edit.is_none
    assert Edit((Add("b", "c", 1e-9),), (1.0, 1.0)).is_none


def test_an_edit_that_leads_far_out_says_so(digits_run: Path) -> None:
    """In one sentence; an image like the training images has none, nor one that there is nothing to compare with."""
    opened = OpenRun.open(str(digits_run))
    subject = Subject(opened, opened.pick(HeldOut(0)))
    found = subject.edited(Edit())
    assert subject.outside(found, 1e9) == ""
    assert "not finite" in subject.outside(found._replace(finite=False), 1.0)
    opened.scores()
    assert subject.outside(found, subject.bits) == ""
    noise = 16 * torch.randint(2, (1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert subject.outside(Edited(noise, True, ()), subject.bits_of(noise)).startswith("Far out: ")
    near, far = (subject.edited(Edit((Add("3", "rest", strength),))) for strength in (0.2, 9.0))
    assert (near.beyond, far.beyond) == ((), ("3",))
    assert subject.outside(far._replace(finite=True), 1.0).endswith(" so far along 3.")


def assert_written(made: Made, name: str) -> None:
    """The file that the shown command writes holds the same bytes."""
    _, *words = shlex.split(made.whole_command(name))
    assert main(words) == 0
    assert Path(words[-1]).read_bytes() == made.data


def test_nothing_is_written_over_what_is_read(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an image has the name that is offered for what is made of it; and all pictures are large."""
    monkeypatch.chdir(tmp_path)
    opened, name = OpenRun.open(str(digits_run)), "-edit.png"
    Image.new("L", (20, 20), 50).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    picked = opened.pick(File(name))
    subject, other = Subject(opened, picked), Subject(opened, opened.pick(HeldOut(0)))
    path, scores = Between(subject, other), score_files(opened, [picked])
    frames, _ = path.frames([0.0, 0.5, 1.0])
    for made in (
        subject.made(subject.pixels, Edit()),
        subject.made(subject.pixels, Edit(), scale=2),
        path.made(frames),
        path.made(path.frames([0.25])[0], 0.25),
    ):
        one = "--at" in made.command or made.command.startswith("pyglow-fast edit")
        large = max(Image.open(io.BytesIO(made.data)).size) >= 256
        assert large == ("--scale" not in made.command) or not one
        assert_written(made, name)
    assert_written(Grid(opened, Draw(4)).made(), "samples.png")
    assert_written(path.made(frames, suffix=".gif"), "path.gif")
    assert_written(made_csv(opened, scores), "scores.csv")
    assert_written(made_picture(opened, scores), name)
    assert (tmp_path / name).read_bytes() == before
    assert Grid(opened, Draw(1)).made().command.endswith("--seed 0")
    assert Grid(replace(opened, device="cpu"), Draw(1)).made().command.endswith("--seed 0 --device cpu")
