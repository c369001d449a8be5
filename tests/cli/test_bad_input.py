"""Every wrong call: one line with the argument, what was expected and what was found; exit code 2; nothing made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from pyglow_fast import _backend
from pyglow_fast.cli import main
from pyglow_fast.data import DATA_HELP
from pyglow_fast.train import RunFolder


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
TRAIN = [
    ([], f"data: expected {DATA_HELP}, found none"),
    (["cifar"], f"data: expected {DATA_HELP}, found 'cifar'"),
    (["folder:"], f"data: expected {DATA_HELP}, found 'folder:'"),
    (["cifar10:none"], ".*, found .*none.*"),
    (["mnist"], ".*pyglow-fast data mnist.*"),
    (["folder:good", "--attribute", "Smiling"], "attribute: expected no such option for folder:good .*, found Smiling"),
    (["folder:good", "--on-unreadable", "cry"], "on_unreadable: expected one of ('raise', 'skip'), found 'cry'"),
    (["folder:good", "--crop-margin", "-1"], "crop_margin: expected a whole number, 0 or more, found -1"),
    (["folder:good", *FOLDER, "--workers", "-1"], "workers: expected a whole number, 0 or more, or none, found -1"),
    (
        ["folder:good", "--in-memory", "--from-files"],
        "argument --from-files: not allowed with argument --in-memory .*",
    ),
    (["folder:none"], "folder: expected an existing folder, found 'none'"),
    (["folder:file"], "folder: expected an existing folder, found 'file' (a file)"),
    (["folder:empty"], "folder: expected a folder with images that Pillow reads, found none in 'empty'"),
    (["folder:corrupt", *FOLDER], "corrupt/bad.jpg: expected an image that Pillow can decode, found .*"),
    (["folder:small", *FOLDER], "small/0.png: expected an image of at least 16x16, found 8x8"),
    (["folder:flat", *FOLDER], "data: expected at least 2 images (or groups of images) to hold some out, found 1"),
    (
        ["folder:odd", "--size", "12", "--n-levels", "3"],
        "image_shape: expected sides divisible by 2^n_levels = 8, found (3, 12, 12)",
    ),
    (["folder:good", "--n-bits", "9"], "n_bits: expected a whole number in 1..8, or none, found 9"),
    (["folder:good", "--n-bits", "0"], "n_bits: expected a whole number in 1..8, or none, found 0"),
    (["folder:good", "--n-bits", "five"], "argument --n-bits: expected a whole number, found 'five' .*"),
    (["folder:good", "--size", "-4"], "size: expected a positive whole number, or none, found -4"),
    (["folder:good", "--split-by", "class"], "split_by: expected one of ('file', 'folder'), found 'class'"),
    (
        ["folder:good", "--class-conditional", *FOLDER],
        "class_conditional: expected images with labels, found none in folder:good",
    ),
    (
        ["folder:good", "--gray", "--color"],
        "argument --color: not allowed with argument --gray (see pyglow-fast train --help)",
    ),
    (
        ["digits", "--n-bits", "4"],
        "n_bits: expected no such option for digits (its images are 8x8, grey, with 17 grey levels), found 4",
    ),
    (["digits", "--size", "7"], "size: expected at least 8, the side of the images of digits, found 7: .*"),
    (["digits", "--scale", "2"], "scale: expected no such option for digits .*, found 2"),
    (["digits", "--n-levels", "4"], "image_shape: expected sides divisible by 2^n_levels = 16, found (1, 8, 8)"),
    (["digits", "--n-levels", "0"], "n_levels: expected a positive whole number, found 0"),
    (["digits", "--n-steps", "-3"], "n_steps: expected a positive whole number, found -3"),
    (["digits", "--hidden", "0"], "hidden: expected a positive whole number, found 0"),
    (["digits", "--coupling", "linear"], "coupling: expected one of ('affine', 'additive'), found 'linear'"),
    (["digits", "--permutation", "none"], "permutation: expected one of .*, found 'none'"),
    (["digits", "--scale-map", "relu"], "scale_map: expected one of .*, found 'relu'"),
    (["digits", "--optimizer", "sgd"], "optimizer: expected one of ('adam', 'adamw', 'adamax'), found 'sgd'"),
    (["digits", "--lr", "0"], "lr: expected a positive number, found 0.0"),
    (["digits", "--lr", "fast"], "argument --lr: expected a number, found 'fast' .*"),
    *(
        (["digits", "--memory", said], f"{MEMORY}, found {said!r}")
        for said in ("disk", "4XB", "", "-1", "0", "nan", "1.5")
    ),
    (["digits", "--precision", "int8"], "precision: expected one of .*, found 'int8'"),
    (["digits", "--ema", "1"], "ema_decay: expected a number between 0 and 1, or none, found 1.0"),
    (["digits", "--ema", "0.9", "--no-ema"], "argument --no-ema: not allowed with argument --ema .*"),
    (["digits", "--accumulate", "3"], "accumulate: expected a divisor of batch_size, 64, found 3"),
    (["digits", "--patience", "0"], "patience: expected a positive whole number, or none, found 0"),
    (["digits", "--keep", "0"], "keep: expected a positive whole number, found 0"),
    (["digits", "--max-skipped", "-1"], "max_skipped: expected a whole number, 0 or more, found -1"),
    (
        ["digits", "--optimizer", "adam", "--weight-decay", "0.1"],
        "weight_decay: expected 0 with optimizer 'adam' (adamw has it), found 0.1",
    ),
    (["digits", "--cuda-graphs"], "cuda_graphs: expected one rank on a GPU, found 1 ranks on cpu"),
    (["digits", "--config", "none.toml"], "config: expected an existing file, found 'none.toml'"),
    (["digits", "--config", "file"], "config: expected a file ending in one of .*, found 'file'"),
    (["digits", "--clip", "-1"], "clip_norm: expected a positive number, or none, found -1.0"),
    (["digits", "--clip", "1", "--no-clip"], "argument --no-clip: not allowed with argument --clip .*"),
    (["digits", "--warmup", "-1"], "warmup_steps: expected a whole number, 0 or more, found -1"),
    (["digits", "--batch-size", "0"], "batch_size: expected a positive whole number, found 0"),
    (["digits", "--batch-size", "2000"], "batch_size: expected at most the 1617 training images, found 2000"),
    (["digits", "--held-out", "half"], "argument --held-out: .*'half'.*"),
    (["digits", "--n-levels", "1000000000000"], "n_levels: expected at most 30 (.*), found 1000000000000"),
    (["digits", "--n-levels", "31"], "n_levels: expected at most 30 (.*), found 31"),
    (["digits", "--size", "2000000"], "size: expected at most 1048576 (.*), found 2000000"),
    (["folder:good", "--size", "100000000"], "size: expected at most 1048576 (.*), found 100000000"),
    (["digits", "--crop-margin", "99999999999"], "crop_margin: expected at most 1048576 (.*), found 99999999999"),
    (["digits", "--crop-margin", "1" + "0" * 60], "crop_margin: expected at most 1048576 (.*), found 1000.*"),
    (["photos:good", "--scale", "100000000"], "scale: expected at most 1048576 (.*), found 100000000"),
    (
        ["digits", "--n-steps", "100000000"],
        "n_steps: expected at most 10000 (each is some modules .*), found 100000000",
    ),
    (["digits", "--hidden", "100000000"], "hidden: expected at most 65536 (.*), found 100000000"),
    (
        ["digits", "--last-checkerboard", "1000000"],
        "n_last_checkerboard: expected at most 10000 (.*), found 1000000",
    ),
    (["digits", "--scale-bias", "1e308"], "scale_bias: expected at most 1e+30 (float32 has to hold it), found 1e+308"),
    (["digits", "--lr", "1e308"], "lr: expected at most 1000000 (float32 has to hold its products), found 1e+308"),
    (["digits", "--workers", "100000"], "workers: expected at most 1024 (each is a process .*), found 100000"),
    (["digits", "--threads", "1000000"], "threads: expected at most 1024 (.*), found 1000000"),
    (["digits", "--seed", "1" + "0" * 60], "seed: expected at most 9223372036854775807 (.*), found 1000.*"),
    (
        ["digits", "--device", "cuda:9999999999999"],
        "device: expected a number of at most three digits behind 'cuda:', .*",
    ),
    (["folder:a\nb\x1b[31m"], r"folder: expected an existing folder, found 'a\nb\x1b[31m'"),
    (["digits", "--a\nb\x1b[31m"], r"unrecognized arguments: --a\nb\x1b[31m (see pyglow-fast --help)"),
    (["digits", "--max-steps", "0"], "max_steps: expected a positive whole number, or none, found 0"),
    (["digits", "--max-epochs", "0"], "max_epochs: expected a positive whole number, or none, found 0"),
    (["digits", "--max-minutes", "-2"], "max_minutes: expected a positive number, or none, found -2.0"),
    (["digits", "--seed", "-1"], "seed: expected a whole number, 0 or more, found -1"),
    (["digits", "--held-out", "1"], "held_out: expected a number between 0 and 1, or none, found 1.0"),
    (["digits", "--eval-every", "0"], "eval_every: expected a positive whole number, found 0"),
    (["digits", "--temperature", "-0.5"], "sample_temperature: expected a number, 0 or more, found -0.5"),
    (["digits", "--device", "gpu"], "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found 'gpu'"),
    (["digits", "--device", "cuda:99"], "device: expected a device that torch finds, found 'cuda:99' with .*"),
    (["digits", "--speed", "9"], "unrecognized arguments: --speed 9 (see pyglow-fast --help)"),
    (["digits", "--max-step", "0"], "unrecognized arguments: --max-step 0 (see pyglow-fast --help)"),
    (["digits", "--resume", "--overwrite"], "argument --overwrite: not allowed with argument --resume .*"),
    (["digits", "--resume"], "run: expected the folder of a run, found 'out', which does not exist"),
]


def refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 2 and prints exactly one line, ``error: message``, where ``.*`` stands for anything."""
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.fullmatch(f"error: {pattern}\n", captured.err), captured.err


@pytest.mark.parametrize(
    ("arguments", "message"), TRAIN, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_train(place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train", *arguments, "--out", "out"], message, capsys)
    assert not Path("out").exists()


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


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "out: expected a folder, found a file, 'file'"),
        ("file/run", "out: expected a folder that can be made, found .*file' is a file"),
        ("full", "out: expected a new or empty folder, or a run, found 'full', which holds ['thesis.tex']"),
    ],
)
def test_train_out(place: Path, out: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["train", "digits", "--overwrite", "--out", out], message, capsys)
    assert Path("file").read_text() == "x"
    assert os.listdir("full") == ["thesis.tex"]


def test_train_out_that_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a patch, since root may write anywhere."""

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "out")

    monkeypatch.setattr(Path, "mkdir", refuse)
    message = "out: expected a folder that can be written, found [Errno 13] Permission denied: 'out'"
    refused(["train", "digits", "--quiet", "--out", "out"], message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see pyglow-fast --help)"),
        (["fly"], "argument COMMAND: invalid choice: 'fly' .*"),
        (["train", "digits"], "out: expected the folder of the run (--out DIR), found none"),
        (["train", "digits", "--config", "file"], "config: expected a file ending in one of .*"),
        (["train", "--unknown"], "unrecognized arguments: --unknown .*"),
        (["sample"], "the following arguments are required: RUN, --out (see pyglow-fast sample --help)"),
        (["demo"], "the following arguments are required: --out (see pyglow-fast demo --help)"),
        (["demo", "--out", "out", "--minutes", "0"], "max_minutes: expected a positive number, or none, found 0.0"),
        (["train", "digits", "--out", ""], "argument --out: expected the name of a folder, found '' .*"),
        (["train", "digits", "--resume", "--out", ""], "argument --out: expected the name of a folder, found '' .*"),
        (["demo", "--out", ""], "argument --out: expected the name of a folder, found '' .*"),
        (["sample", "", "--out", "x.png"], "argument RUN: expected the name of a folder, found '' .*"),
        (["demo", "--out", "full"], "out: expected a new or empty folder, or a run, found 'full', .*"),
    ],
)
def test_commands(place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(arguments, message, capsys)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "n: expected a positive whole number, found 0"),
        (["--n", "1000000"], "n: expected at most 65536 (all of them are in one picture), found 1000000"),
        (["--columns", "1000000"], "columns: expected at most 65536 (.*), found 1000000"),
        (["--scale", "1" + "0" * 60], "scale: expected at most 256 (.*), found 1000.*"),
        (["--columns", "-1"], "columns: expected a positive whole number, found -1"),
        (["--scale", "0"], "scale: expected a positive whole number, found 0"),
        (["--temperature", "-1"], "temperature: expected a number, 0 or more, found -1.0"),
        (["--temperature", "nan"], "temperature: expected a number, 0 or more, found nan"),
        (["--seed", "-1"], "seed: expected a whole number, 0 or more, found -1"),
        (["--label", "ten"], "label: expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, found 'ten'"),
        (["--out", ""], "out: expected a name ending in .png, found ''"),
        (["--out", "x.jpg"], "out: expected a name ending in .png, found 'x.jpg'"),
        (["--out", "none/x.png"], "out: expected a file in an existing folder, found 'none/x.png'"),
        (["--device", "tpu"], "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found 'tpu'"),
    ],
)
def test_sample(
    trained: Path, place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["sample", str(trained), "--out", "x.png", *arguments], message, capsys)
    assert not list(place.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], f"data: expected {DATA_HELP}, found 'cifar'"),
        (["folder:empty"], "folder: expected a folder with images that Pillow reads, found none in 'empty'"),
        (["folder:good"], "data: expected n_bins 17, as the model was trained on, found 256"),
        (["digits", "--batch-size", "0"], "batch_size: expected a positive whole number, found 0"),
        (["digits", "--batch-size", "1" + "0" * 60], "batch_size: expected at most 65536 (.*), found 1000.*"),
        (["digits", "--part", "half"], "argument --part: invalid choice: 'half' .*"),
    ],
)
def test_evaluate(
    trained: Path, place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["evaluate", str(trained), *arguments], message, capsys)


def test_evaluate_a_folder_run_on_digits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*FOLDER, "--batch-size", "2", "--max-steps", "1", "--quiet"]
    assert main(["train", "folder:good", "--out", "out", *options]) == 0
    shape = "data: expected images of shape (3, 16, 16), as the model was trained on, found (1, 16, 16)"
    refused(["evaluate", "out", "digits"], shape, capsys)
    part = "part: expected all, since these are not the images of the run, found train"
    Image.new("RGB", (16, 16)).save("flat/1.png")
    refused(["evaluate", "out", "folder:flat", "--part", "train"], part, capsys)
    no_classes = "label: expected no label, since the model has no classes, found '1'"
    refused(["sample", "out", "--out", "x.png", "--label", "1"], no_classes, capsys)


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


def test_serve_with_no_such_device(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    message = "device: expected a number of at most three digits behind 'cuda:', found 'cuda:9999999999999'"
    refused(["serve", str(trained), "--no-browser", "--device", "cuda:9999999999999"], message, capsys)


def test_reconstruct(trained: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reconstruct", str(trained), "digits", "--out"]
    refused([*command, "x.png", "--n", "0"], "n: expected a positive whole number, found 0", capsys)
    refused([*command, "x"], "out: expected a name ending in .png, found 'x'", capsys)


def _edit_config(run: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("hidden = 4", "hidden = 8"))


def _foreign(run: Path) -> None:
    for path in RunFolder(run).saved():
        save_file(load_file(path), path)


def _truncate(run: Path) -> None:
    for path in RunFolder(run).saved():
        os.truncate(path, 1000)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, ".*step-0000020.safetensors: expected a complete safetensors file, found .*"),
        (_foreign, ".*: expected a checkpoint of pyglow_fast, found another safetensors file"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "run: expected a checkpoint .*, found none in .*"),
        (lambda run: (run / "config.toml").unlink(), "run: expected the folder of a run (with config.toml), found .*"),
        (
            lambda run: (run / "config.toml").write_text("{"),
            ".*config.toml: expected a configuration as TOML, found .*",
        ),
        (_edit_config, ".*config.toml: expected model.hidden = 4, as in step-0000020.safetensors, found 8"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["sample", "run", "--out", "x.png"],
        ["evaluate", "run", "digits"],
        ["reconstruct", "run", "digits", "--out", "x.png"],
        ["train", "digits", "--out", "run", "--resume"],
    ],
    ids=lambda command: command[0],
)
def test_a_spoilt_run(
    run: Path,
    command: list[str],
    spoil: Callable[[Path], Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run.parent)
    spoil(run)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    refused(command, message, capsys)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--lr", "0.5"], "lr: expected .*, as the run was started with, found 0.5"),
        (["digits", "--hidden", "8"], "hidden: expected 4, as the run was started with, found 8"),
        (["digits", "--held-out", "0.3"], "held_out: expected None, as the run was started with, found 0.3"),
        (["digits", "--max-steps", "15"], "max_steps: expected more than the 20 steps done, found 15"),
        (["folder:x"], "data: expected 'digits', as the run was started with, found 'folder:x'"),
    ],
)
def test_resume(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    refused(["train", *arguments, "--out", str(run), "--resume"], message, capsys)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_to_go_on_with_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where --config alone would name the folder of a new run."""
    command = ["train", "--resume", "--config", str(run / "config.toml")]
    refused(command, "out: expected the folder of the run (--out DIR), found none", capsys)


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
