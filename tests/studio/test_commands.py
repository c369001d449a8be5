"""Commands that are shown with pictures: they can be run where they are shown, whatever the files there are called."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from pyglow_fast.studio.commands import free_name, path_word, taken_names

from pyglow_fast.cli import main
from pyglow_fast.studio import Between, Draw, Edit, File, Grid, HeldOut, Made, OpenRun, Subject, score_files
from pyglow_fast.studio.scored import made_csv, made_picture


def runs(made: Made, name: str) -> bool:
    """Whether the shown command writes these bytes to the file that it names."""
    _, *words = shlex.split(made.whole_command(name))
    assert main(words) == 0
    path = Path(words[-1])
    assert path.name == made.file_name(name)
    return path.read_bytes() == made.data


@pytest.mark.full
def test_nothing_is_written_over_what_is_read(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an image has the name that is offered for what is made of it."""
    monkeypatch.chdir(tmp_path)
    opened = OpenRun.open(str(digits_run))
    for name in ("edit.png", "EDIT.png", "-x.png"):
        Image.new("L", (20, 20), 50).save(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        picked = opened.pick(File(name))
        subject = Subject(opened, picked, opened.space)
        assert runs(subject.made(subject.pixels, Edit()), "edit.png")
        assert runs(subject.made(subject.pixels, Edit()), name)
        path = Between(opened, picked, opened.pick(HeldOut(0)), opened.space)
        assert runs(path.made(path.frames(3)[0], ".png"), name)
        scores = score_files(opened, [picked])
        assert runs(made_csv(opened, scores), "scores.csv")
        assert runs(made_picture(opened, scores), name)
        assert (tmp_path / name).read_bytes() == before


def test_what_the_run_keeps_is_not_written_over(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the page is started in the folder of the run, whose samples.png would be the name of new samples too."""
    folder = shutil.copytree(digits_run, tmp_path / "run")
    monkeypatch.chdir(folder)
    opened = OpenRun.open(".")
    made = Grid(opened, Draw(n=4)).made()
    assert made.whole_command("samples.png").endswith(" --out samples-2.png")
    assert runs(made, "samples.png")
    assert free_name("report.html", taken_names(opened)) == "report-2.html"
    monkeypatch.chdir(tmp_path)
    assert Grid(OpenRun.open("run"), Draw(n=4)).made().file_name("samples.png") == "samples.png"


def test_a_name_is_taken_once_more() -> None:
    assert free_name("a.png", frozenset({"a.png", "a-2.png"})) == "a-3.png"
    assert free_name("A.png", frozenset({"a.png"})) == "A-2.png"
    assert free_name("b.png", frozenset({"a.png"})) == "b.png"
    assert (path_word("-b.png"), path_word("b.png")) == ("./-b.png", "b.png")
