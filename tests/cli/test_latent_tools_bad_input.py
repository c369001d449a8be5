"""Every wrong call of the latent tools: one line, exit code 2, and what was there is untouched."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.latent_runs import train, write_emoji

from pyglow_fast.cli import main
from pyglow_fast.data import DataConfig, load_data, split
from pyglow_fast.train import Checkpoint, RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs on emoji (two levels), on digits (labelled) and on images without labels, as the current folder."""
    root = tmp_path_factory.mktemp("bad")
    before = Path.cwd()
    os.chdir(root)
    write_emoji(Path("emoji"))
    train("emoji:emoji", Path("two"), "--size", "16", "--n-levels", "2")
    train("digits", Path("digits"), "--n-levels", "1", "--class-conditional")
    Path("plain").mkdir()
    for i in range(8):
        values = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(values).save(f"plain/{i}.png")
    train("folder:plain", Path("unlabelled"), "--size", "16", "--n-levels", "1", "--batch-size", "2")
    Path("old.png").write_text("old")
    Path("old.csv").write_text("old")
    yield root
    os.chdir(before)


CLASSES = ["--plus", "Squares", "--minus", "Discs"]


def refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, one line; the files that were there are as they were, and there are no others."""
    before = sorted(path.name for path in Path().iterdir())
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.fullmatch(f"error: {pattern}\n", captured.err), captured.err
    assert sorted(path.name for path in Path().iterdir()) == before
    assert Path("old.png").read_text() == Path("old.csv").read_text() == "old"


def case(value: list[str] | str) -> str:
    """A name for the case: the command line, without the message."""
    return " ".join(value)[:60] if isinstance(value, list) else ""


KEPT = "out: expected another file than those that a run keeps, found "
AMONG = "expected a file outside of the folder of "
OVER_INPUT = [
    (["temperatures", "two", "--out", "two/samples.png"], f"{KEPT}'two/samples.png'"),
    (["sample", "two", "--out", "two/curve.png"], f"{KEPT}'two/curve.png'"),
    (["score", "two", "emoji:emoji", "--out", "digits/metrics.csv"], f"{KEPT}'digits/metrics.csv'"),
    (["levels", "unlabelled", "folder:plain", "--out", "plain/0.png"], f"out: {AMONG}folder:plain, found .*"),
    (["reconstruct", "unlabelled", "folder:plain", "--out", "plain/new.png"], f"out: {AMONG}folder:plain, found .*"),
    (["score", "unlabelled", "folder:plain", "--out", "plain/x.csv"], f"out: {AMONG}folder:plain, found .*"),
    (["ood", "two", "emoji:emoji", "folder:plain", "--out", "plain/0.png"], f"out: {AMONG}folder:plain, found .*"),
    (
        ["ood", "two", "emoji:emoji", "photos:plain", "--out", "x.png", "--csv", "plain/x.csv"],
        f"csv: {AMONG}photos:plain, found .*",
    ),
    (["interpolate", "unlabelled", "folder:.", "--out", "plain/0.png"], f"out: {AMONG}folder:., found .*"),
    (["manipulate", "two", "folder:plain", *CLASSES, "--out", "plain/0.png"], f"out: {AMONG}folder:plain, found .*"),
    (["sample", "unlabelled", "--out", "plain/new.png"], f"out: {AMONG}folder:plain, found .*"),
    (["edit", "unlabelled", "0", "--out", "plain/new.png"], f"out: {AMONG}folder:plain, found .*"),
    (["score", "unlabelled", "plain/0.png", "--out", "plain/x.csv"], f"out: {AMONG}folder:plain, found .*"),
    (["score", "unlabelled", "old.png", "--picture", "plain/x.png"], f"picture: {AMONG}folder:plain, found .*"),
    (
        ["interpolate", "unlabelled", "--from", "0", "--to", "0", "--out", "plain/x.gif"],
        f"out: {AMONG}folder:plain, found .*",
    ),
]


@pytest.mark.parametrize(("command", "message"), OVER_INPUT, ids=case)
def test_what_is_read_is_not_written_over(
    place: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    before = files()
    refused(command, message, capsys)
    assert files() == before


COMMANDS = [
    ["interpolate", "spoilt", "emoji:emoji"],
    ["manipulate", "spoilt", "emoji:emoji", "--tone", "dark"],
    ["temperatures", "spoilt"],
    ["levels", "spoilt", "emoji:emoji"],
    ["depths", "two", "spoilt"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_weights_that_do_not_fit_the_configuration(
    place: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration that was edited, and one whose weights are another model's (saved so, with a good digest)."""
    spoilt = place / "spoilt"
    for name in ("config.toml", "checkpoints"):
        source, target = place / "two" / name, spoilt / name
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            for path in source.iterdir():
                (target / path.name).write_bytes(path.read_bytes())
        else:
            target.parent.mkdir(exist_ok=True)
            target.write_text(source.read_text().replace("hidden = 4", "hidden = 8"))
    message = ".*config.toml: expected model.hidden = 4, as in step-0000010.safetensors, found 8"
    refused([*command, "--out", "old.png"], message, capsys)
    (spoilt / "config.toml").write_text((place / "two" / "config.toml").read_text())
    (path, *_) = RunFolder(spoilt).saved()
    checkpoint = Checkpoint.load(path)
    checkpoint.model = {name: tensor for name, tensor in checkpoint.model.items() if not name.startswith("prior")}
    checkpoint.ema = {name: tensor for name, tensor in checkpoint.ema.items() if not name.startswith("prior")}
    for other in RunFolder(spoilt).saved():
        other.unlink()
    checkpoint.save(path)
    message = "spoilt: expected weights that fit its own configuration, found no tensor 'prior.mean_log_sd' (1 missing)"
    refused([*command, "--out", "old.png"], message, capsys)
    save_file(load_file(path), path)
    refused([*command, "--out", "old.png"], ".*: expected a checkpoint of pyglow_fast, found another .*", capsys)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_missing_library(
    place: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the run is opened."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # None makes the import fail
    message = 'matplotlib is needed for labelled pictures and cannot be imported (.*): pip install "pyglow-fast[train]"'
    refused([*command, "--out", "old.png"], message, capsys)


def test_a_class_without_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of emoji whose only square is held out."""
    write_emoji(place / "few", 3)
    for i in range(1, 3):
        (place / "few" / "img" / "test" / "64" / f"square{i}.png").unlink()
    data = load_data(DataConfig("emoji:few", size=16))
    square = data.groups.index("square0")
    seed = next(seed for seed in range(100) if square in split(data, None, seed)[1].tolist())
    options = ["--size", "16", "--n-levels", "1", "--seed", str(seed), "--batch-size", "2"]
    train("emoji:few", place / "rare", *options)
    command = ["manipulate", "rare", "emoji:few", "--out", "old.png"]
    none = "expected a class with training images, found none of 'Squares'"
    refused([*command, "--plus", "Squares", "--minus", "rest"], f"plus: {none}", capsys)
    refused([*command, "--plus", "Discs", "--minus", "Squares"], f"minus: {none}", capsys)
    none = "expected a class with training images, found none of 'rest'"
    refused([*command, "--plus", "Discs", "--minus", "rest"], f"minus: {none}", capsys)
