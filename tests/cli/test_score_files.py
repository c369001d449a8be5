"""``pyglow-fast score RUN FILES``: single images beside the run's own."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.edits import ByHand, assert_repeatable, rgb_of
from support.odd_names import FILES, train_odd, write_odd_files, write_odd_images

from pyglow_fast.cli import main
from pyglow_fast.data import ImageSet
from pyglow_fast.latents import likeliest_class
from pyglow_fast.train import RunFolder, score_images

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes have odd names, and one without classes on the same images."""
    root = tmp_path_factory.mktemp("scores")
    write_odd_images(root / "images")
    train_odd(root / "images", root / "it's $odd")
    return root


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Image files of odd names in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_odd_files(tmp_path)
    return list(FILES)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def said(capsys: Capture, *command: str) -> str:
    capsys.readouterr()
    assert main(list(command)) == 0
    return capsys.readouterr().out


def test_bits_of_each_image_alone(place: Path, files: list[str], capsys: Capture) -> None:
    """As score_images gives them, under the likeliest class; the order does not matter; edit says the same."""
    run, by_hand = place / "it's $odd", ByHand(place / "it's $odd")
    texts = {}
    for order in (files, files[::-1]):
        texts[order[0]] = said(capsys, "score", str(run), *order, "--out", "x.csv")
        found = rows(Path("x.csv"))
        assert [row["name"] for row in found] == order
        for row in found:
            with Image.open(row["name"]) as picture:
                pixels = torch.from_numpy(np.array(picture))[None, None]
            with torch.no_grad():
                label = likeliest_class(by_hand.model, by_hand.x(pixels))
            one = ImageSet("one", pixels, 256, label, by_hand.data.class_names)
            bits = float(score_images(by_hand.model, one, 1, seed=0).bits_per_dim[0])
            assert float(row["bits_per_dim"]) == pytest.approx(bits, abs=1e-6)  # of its printed digits
            assert row["label"].removeprefix("'") == by_hand.data.class_names[int(label)]
    first, second = ([line for line in text.splitlines() if line.startswith("  ")] for text in texts.values())
    assert first == second[::-1]
    for line, file in zip(first, files, strict=True):
        edit = said(capsys, "edit", str(run), file, "--out", "e.png").splitlines()[0]
        assert re.fullmatch(r"before: (.*), more than (.*) of \d+ training images", edit)
        assert line == edit.replace("before", f"  {file}")


def test_numbers_and_samples_too(place: Path, files: list[str], capsys: Capture) -> None:
    run, by_hand = place / "it's $odd", ByHand(place / "it's $odd")
    said(capsys, "score", str(run), "3", files[3], "sample:1:n=2:label=4", "--out", "x.csv")
    found = rows(Path("x.csv"))
    names = [row["name"] for row in found]
    assert names == ["3", files[3], "sample:1:n=2:seed=0:temperature=0.7:label=4"]
    pixels, label = by_hand.held(3)
    assert label is not None
    one = ImageSet("one", pixels[None], 256, torch.tensor([label]), by_hand.data.class_names)
    bits = float(score_images(by_hand.model, one, 1, seed=0).bits_per_dim[0])
    assert float(found[0]["bits_per_dim"]) == pytest.approx(bits, abs=1e-6)
    assert found[2]["label"] == by_hand.data.class_names[4]


@pytest.mark.full
@pytest.mark.drawn
def test_the_picture(place: Path, files: list[str], capsys: Capture) -> None:
    """A histogram with a line for each image, whatever their names; it repeats by the command it holds."""
    run = str(place / "it's $odd")
    some = [files[0], files[4], files[6]]
    said(capsys, "score", run, *some, "--picture", "p.png")
    with Image.open("p.png") as picture:
        assert picture.size == (960, 540)
    assert assert_repeatable(Path("p.png"), "--picture") == ["score", run, *some]
    before = rgb_of(Path("p.png"))
    said(capsys, "score", run, some[0], "--picture", "q.png")
    assert assert_repeatable(Path("q.png"), "--picture") == ["score", run, some[0]]
    red = [((image == (214, 39, 40)).all(-1)).any(1).sum() for image in (before, rgb_of(Path("q.png")))]
    assert min(red) > 200  # a line from the bottom of the axes to their top


def test_both_files_at_once_and_the_scores_are_kept(
    place: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = str(shutil.copytree(place / "it's $odd", "run"))
    shutil.rmtree(Path(run, "cache"), ignore_errors=True)
    first = said(capsys, "score", run, files[3], "--out", "x.csv", "--picture", "x.png")
    assert first.splitlines()[-2:] == ["x.csv", "x.png"]
    assert [path.name.split("-")[0] for path in RunFolder(run).cache.iterdir()] == ["scores"]
    monkeypatch.setattr("pyglow_fast.studio.opened.random_subset", lambda *args: pytest.fail("scored again"))
    assert said(capsys, "score", run, files[3], "--out", "x.csv", "--picture", "x.png") == first
    said(capsys, "score", run, "./12", "--out", "x.csv")
    assert rows(Path("x.csv"))[0]["name"] == "./12"
