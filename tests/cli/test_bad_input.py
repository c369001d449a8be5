"""Every wrong call: one line with the argument, what was expected and what was found; exit code 2; nothing made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyglow_fast import _backend
from pyglow_fast.cli import main


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with good and bad images in it, and no data that were fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "none"))
    for name, side, count in (("good", 16, 4), ("odd", 12, 4), ("small", 8, 1), ("corrupt", 16, 1), ("flat", 16, 1)):
        Path(name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((side, side, 3), 40 * i, dtype=np.uint8)).save(f"{name}/{i}.png")
    Path("corrupt/bad.jpg").write_bytes(b"\xff\xd8\xff no more")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("x")
    Path("file").write_text("x")
    return tmp_path


FOLDER = ["--size", "16", "--n-levels", "1", "--n-steps", "1", "--hidden", "4"]
MEMORY = 'memory: expected one of ("reversible", "checkpoint", "store") or bytes such as "4GB"'


def refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 2 and prints exactly one line, ``error: message``, where ``.*`` stands for anything."""
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.fullmatch(f"error: {pattern}\n", captured.err), captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = ", "x.toml: expected a configuration as TOML, found .*"),
        ("speed = 3", "x.toml: expected settings among .*, found speed"),
        ("data = 3", "x.toml: data: expected a table, found int"),
        ("[data]\nsides = 3", "x.toml: data: expected settings among .*, found sides"),
        ("[data]\nname = 3", "x.toml: data.name: expected a text, found 3"),
        ("[model]\ndepth = 3", "x.toml: model: expected settings among .*, found depth"),
        ("[model]\nhidden = 'wide'", "hidden: expected a positive whole number, found 'wide'"),
        ("[model]\nimage_shape = [3, 8, 8]", "image_shape: expected (1, 8, 8), as the images have it, found (3, 8, 8)"),
        ("[model]\nn_classes = 10", "n_classes: expected None, as the images have it, found 10"),
        ("lr = 'fast'", "lr: expected a positive number, found 'fast'"),
        ("memory = '4XB'", f"{MEMORY}, found '4XB'"),
        ("memory = nan", f"{MEMORY}, found nan"),
        ("memory = true", f"{MEMORY}, found True"),
        ("memory = 0.5", f"{MEMORY}, found 0.5"),
        ("class_conditional = 1", "class_conditional: expected true or false, found 1"),
        ("batch_size = 1.5", "batch_size: expected a positive whole number, found 1.5"),
        ("max_steps = 'none'\nmax_epochs = 0", "max_epochs: expected a positive whole number, or none, found 0"),
        ("tensorboard = 'yes'", "tensorboard: expected true or false, found 'yes'"),
    ],
)
def test_train_from_a_file(place: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.toml").write_text(text)
    refused(["train", "digits", "--config", "x.toml", "--out", "out"], message, capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [["evaluate"], ["reconstruct", "--out", "x.png"], ["score", "--out", "x.csv"]])
def test_an_image_that_is_spoilt_later(place: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of images that are read when they are needed, whichever command needs them; its name may hold anything."""
    options = [*FOLDER, "--from-files", "--batch-size", "2", "--max-steps", "1", "--quiet"]
    assert main(["train", "folder:good", "--out", "out", *options]) == 0
    Path("good/1.png").rename("good/1\x1b[31m\n.png")
    Path("good/1\x1b[31m\n.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyglow_fast.data.lazy.MEMORY_LIMIT", 0)
        found = r"good/1\x1b[31m\n.png: expected an image that Pillow can decode, found .*"
        refused([command[0], "out", "folder:good", *command[1:]], found, capsys)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "digits", "--out", "out"],
        ["train", "digits", "--out", "run", "--resume"],
        ["demo", "--out", "out"],
        ["sample", "run", "--out", "x.png"],
        ["evaluate", "run", "digits"],
        ["reconstruct", "run", "digits", "--out", "x.png"],
    ],
    ids=" ".join,
)
def test_a_bad_choice_of_kernels(
    run: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the extension refuses it; what the variable says is asked for once in a process, so here by a patch."""

    class Extension:
        def instruction_set(self) -> str:
            raise ValueError("PYGLOW_CPU: expected one of portable on this machine, found foo")

    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(_backend, "extension", Extension)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    refused(command, "PYGLOW_CPU: expected one of portable on this machine, found foo", capsys)
    assert os.listdir() == ["run"]
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.full
@pytest.mark.skipif(_backend.extension() is None, reason=_backend.reason())
def test_a_bad_choice_of_kernels_in_the_environment(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyglow_fast", "train", "digits", "--out", "out"]
    environment = os.environ | {"PYGLOW_CPU": "foo"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert re.fullmatch("error: PYGLOW_CPU: expected one of .*portable.*, found foo\n", ended.stderr)
    assert os.listdir(tmp_path) == []


def test_a_missing_library(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # None makes the import fail
    message = 'matplotlib is needed for training and cannot be imported (.*): pip install "pyglow-fast[train]"'
    refused(["train", "digits", "--out", "out"], message, capsys)
    assert not Path("out").exists()
