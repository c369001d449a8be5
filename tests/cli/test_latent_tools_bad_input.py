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


INTERPOLATE = [
    (["--images", "3"], "images: expected the numbers of two different images, found 3"),
    (["--images", "0", "1", "2"], "images: expected the numbers of two different images, found 0 1 2"),
    (["--images", "1", "1"], "images: expected the numbers of two different images, found 1 1"),
    (["--images", "0", "999"], "images: expected numbers in 0...*, found 0 999"),
    (["--images", "0", "1", "--images", "-1", "0"], "images: expected numbers in 0...*, found -1 0"),
    (["--images", "0", "one"], "argument --images: expected a whole number, found 'one' .*"),
    (["--images", "0", "1", "--pairs", "2"], "argument --pairs: not allowed with argument --images .*"),
    (["--pairs", "0"], "pairs: expected a positive whole number, found 0"),
    (["--pairs", "999"], "pairs: expected at most .*, as there are .* images, found 999"),
    (["--frames", "1000000"], "frames: expected at most 1000 (each is a pass through the model), found 1000000"),
    (["--frames", "1"], "frames: expected a whole number, 2 or more, found 1"),
    (["--space", "z"], "argument --space: invalid choice: 'z' .*"),
    (["--scale", "0"], "scale: expected a positive whole number, found 0"),
    (["--seed", "-1"], "seed: expected a whole number, 0 or more, found -1"),
    (["--part", "half"], "argument --part: invalid choice: 'half' .*"),
    (["--device", "tpu"], "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found 'tpu'"),
    (["--out", "old.jpg"], "out: expected a name ending in .png, found 'old.jpg'"),
    (["--out", "none/x.png"], "out: expected a file in an existing folder, found 'none/x.png'"),
]
CLASSES = ["--plus", "Squares", "--minus", "Discs"]
MANIPULATE = [
    ([], "plus: expected a class (or --tone, for emoji), found none"),
    (["--plus", "Squares"], "minus: expected a class (or --tone, for emoji), found none"),
    (["--plus", "Circles", "--minus", "rest"], "plus: expected one of Discs, Squares, found 'Circles'"),
    (["--plus", "Discs", "--minus", "others"], "minus: expected rest or one of Discs, Squares, found 'others'"),
    (["--plus", "Discs", "--minus", "Discs"], "minus: expected another class than plus, found 'Discs'"),
    ([*CLASSES, "--strengths", "nan"], "strengths: expected finite numbers, found nan"),
    ([*CLASSES, "--strengths", "1", "inf"], "strengths: expected finite numbers, found inf"),
    ([*CLASSES, "--strengths", "1e308"], "strengths: expected numbers whose edit can be held, found [1e+308]"),
    ([*CLASSES, "--strengths", "much"], "argument --strengths: expected a number, found 'much' .*"),
    ([*CLASSES, "--strengths"], "argument --strengths: expected at least one argument .*"),
    ([*CLASSES, "--levels", "2"], "levels: expected numbers in 0..1 (0 the shallowest), found 2"),
    ([*CLASSES, "--levels", "-1"], "levels: expected numbers in 0..1 (0 the shallowest), found -1"),
    ([*CLASSES, "--n", "0"], "n: expected a positive whole number, found 0"),
    ([*CLASSES, "--train-images", "0"], "train_images: expected a positive whole number, found 0"),
    (
        [*CLASSES, "--csv", "old.csv"],
        "csv: expected --tone beside it: only there .*, found 'old.csv'",
    ),
    ([*CLASSES, "--attribute", "Smiling"], "attribute: expected no such option for emoji:emoji .*, found Smiling"),
    (["--tone", "purple"], "argument --tone: invalid choice: 'purple' .*"),
    (["--tone", "medium"], "tone: expected training emoji with the tone 'medium', found none"),
    (
        ["--tone", "dark", *CLASSES],
        "plus: expected no such option beside --tone, which takes all pairs, found 'Squares'",
    ),
    (["--tone", "dark", "--csv", "x.txt"], "csv: expected a name ending in .csv, found 'x.txt'"),
    (["--tone", "dark", "--csv", "none/x.csv"], "csv: expected a file in an existing folder, found 'none/x.csv'"),
]
OTHERS = [
    (["temperatures", "two", "--temperatures", "-1"], "temperatures: expected numbers, 0 or more, found -1.0"),
    (["temperatures", "two", "--temperatures", "0", "nan"], "temperatures: expected numbers, 0 or more, found nan"),
    (["temperatures", "two", "--temperatures"], "argument --temperatures: expected at least one argument .*"),
    (["temperatures", "two", "--n", "0"], "n: expected a positive whole number, found 0"),
    (["temperatures", "two", "--label", "1"], "label: expected no label, since the model has no classes, found '1'"),
    (["temperatures", "digits", "--label", "ten"], "label: expected one of 0, 1, .*, found 'ten'"),
    (["temperatures", "plain"], "run: expected the folder of a run (with config.toml), found 'plain' without one"),
    (["temperatures", "nowhere"], "run: expected the folder of a run, found 'nowhere', which does not exist"),
    (["temperatures", "two", "--best", "--device", "cuda:99"], "device: expected .*, found 'cuda:99' with .*"),
    (["levels", "two", "emoji:emoji", "--keep", "2"], "keep: expected levels in 0..1 (0 the shallowest), found 2"),
    (["levels", "two", "emoji:emoji", "--keep", "0", "-1"], "keep: expected levels in 0..1 .*, found 0 -1"),
    (["levels", "two", "emoji:emoji", "--temperature", "-1"], "temperature: expected a number, 0 or more, found -1.0"),
    (["levels", "two", "emoji:emoji", "--temperature", "nan"], "temperature: expected a number, 0 or more, found nan"),
    (["levels", "two", "emoji:emoji", "--n", "-1"], "n: expected a positive whole number, found -1"),
    (["levels", "two", "digits"], "data: expected images of shape (3, 16, 16), as the model was trained on, found .*"),
    (["levels", "two", "cifar"], "data: expected .*, found 'cifar'"),
    (["depths", "two"], "run: expected two runs or more, found 1"),
    (
        ["depths", "two", "digits"],
        "run: expected runs on the images of 'two' (emoji:emoji (3, 16, 16), 256 grey levels), found digits (1, 8, 8), "
        "17 grey levels, in 'digits'",
    ),
    (["depths", "two", "unlabelled"], "run: expected runs on the images of 'two' .*, found folder:plain .*"),
    (["depths", "two", "plain"], "run: expected the folder of a run (with config.toml), found 'plain' without one"),
    (["depths", "two", "two", "--temperature", "inf"], "temperature: expected a number, 0 or more, found inf"),
    (["depths", "two", "two", "--columns", "0"], "columns: expected a positive whole number, found 0"),
    (["depths", "two", "two", "--eval-images", "0"], "eval_images: expected a positive whole number, found 0"),
    (["depths", "two", ""], "argument RUN: expected the name of a folder, found '' .*"),
    (
        ["manipulate", "digits", "digits", "--tone", "dark"],
        "tone: expected emoji as DATA, which have tones, found 'digits'",
    ),
    (
        ["manipulate", "unlabelled", "folder:plain", "--plus", "a", "--minus", "rest"],
        "data: expected images with labels, found none in folder:plain",
    ),
    (["manipulate", "digits", "emoji:emoji", "--tone", "dark"], "data: expected .*, found .*"),
]


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


@pytest.mark.parametrize(("options", "message"), INTERPOLATE, ids=case)
def test_interpolate(place: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["interpolate", "two", "emoji:emoji", "--out", "old.png", *options], message, capsys)


@pytest.mark.parametrize(("options", "message"), MANIPULATE, ids=case)
def test_manipulate(place: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["manipulate", "two", "emoji:emoji", "--out", "old.png", *options], message, capsys)


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


@pytest.mark.parametrize(("command", "message"), OTHERS, ids=case)
def test_others(place: Path, command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused([*command, "--out", "old.png"], message, capsys)


@pytest.mark.parametrize("command", ["interpolate", "manipulate", "temperatures", "levels", "depths"])
def test_required(place: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused([command], "the following arguments are required: RUN, .*--out (see pyglow-fast .* --help)", capsys)


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
