"""``pyglow-fast train`` with presets and a classifier: command line and file say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyglow_fast import presets
from pyglow_fast.cli import main
from pyglow_fast.cli.train import from_file, make_config
from pyglow_fast.data import DATA_HELP, DataConfig
from pyglow_fast.train import RunFolder, TrainConfig, read_config

VARIANT: dict[str, Any] = {"coupling": "additive", "permutation": "shuffle", "n_levels": 1, "n_steps": 2, "hidden": 4}


def trained(arguments: list[str], out: Path) -> TrainConfig:
    assert main(["train", *arguments, "--out", str(out), "--quiet"]) == 0
    return RunFolder(out).load().config


def from_file_alone(path: Path) -> TrainConfig:
    settings, name, preset = from_file(str(path))
    return make_config(settings, name or "digits", preset)[0]


def test_command_line_and_file_say_the_same(tmp_path: Path) -> None:
    """The same variant both ways, with a classifier; what the folder holds is resolved and repeats the run."""
    options = [
        "--coupling",
        "additive",
        "--permutation",
        "shuffle",
        "--n-levels",
        "1",
        "--n-steps",
        "2",
        "--hidden",
        "4",
    ]
    options += ["--no-learn-prior", "--class-weight", "0.1", "--beta2", "0.99", "--max-steps", "1"]
    model = "".join(f"{key} = {value!r}\n" for key, value in VARIANT.items())
    path = tmp_path / "variant.toml"
    path.write_text(
        f'preset = "digits"\nclass_weight = 0.1\nbeta2 = 0.99\nmax_steps = 1\n[model]\nlearn_prior = false\n{model}'
    )
    told = trained(["--preset", "digits", *options], tmp_path / "told")
    assert from_file_alone(path) == told
    assert {key: getattr(told.model, key) for key in VARIANT} == VARIANT
    assert (told.class_weight, told.model.classify, told.model.n_classes, told.beta2) == (0.1, 10, None, 0.99)
    assert (told.optimizer, told.weight_decay, told.max_steps, told.decay_steps) == ("adamw", 0.3, 1, 1)
    assert "preset" not in read_config(tmp_path / "told" / "config.toml")
    assert from_file_alone(tmp_path / "told" / "config.toml") == told


def test_labels_that_are_told_apart_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "digits",
        "--class-weight",
        "1",
        "--class-conditional",
        "--n-levels",
        "1",
        "--n-steps",
        "1",
        "--hidden",
        "4",
    ]
    config = trained([*arguments, "--max-steps", "1", "--eval-images", "8"], tmp_path / "r")
    assert (config.model.n_classes, config.model.classify) == (10, 10)
    assert "; labels " in capsys.readouterr().out


def test_options_and_file_come_before_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('preset = "cifar10"\nlr = 0.5\nbatch_size = 8\n[model]\nn_steps = 2\nn_levels = 1\n')
    settings, name, preset = from_file(str(path))
    assert (name, preset) == (None, "cifar10")
    config, _ = make_config(settings | {"batch_size": 4, "n_bits": None, "size": None}, "digits", preset)
    assert (config.lr, config.batch_size, config.optimizer) == (0.5, 4, "adamax")
    assert (config.model.n_steps, config.model.n_levels, config.model.hidden) == (2, 1, 512)
    assert (config.model.net_actnorm, config.model.image_shape) == (True, (1, 8, 8))


@pytest.mark.parametrize("name", ["nice", "realnvp", "digits"])
def test_the_command_and_python_make_the_same_of_a_preset(name: str) -> None:
    given: dict[str, Any] = {"n_levels": 1, "image_shape": (1, 8, 8)}
    config, _ = make_config({"n_levels": 1}, "digits", name)
    assert config == TrainConfig.preset(name, "digits", **given)
    assert config.data == DataConfig("digits")


def test_the_list_of_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list-presets"]) == 0
    assert capsys.readouterr().out == presets.table() + "\n"


def test_a_preset_in_a_file_must_be_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.toml"
    path.write_text("preset = 3\n")
    assert main(["train", "digits", "--config", str(path), "--out", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err == f"error: {path}: preset: expected a text, found 3\n"
    assert not (tmp_path / "r").exists()


SMALL = ["--n-levels", "1", "--n-steps", "1", "--hidden", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "cifar"], "preset: expected one of cifar10, imagenet32, .*, found 'cifar'"),
        (["--preset", "cifar10"], "data: expected cifar10:PATH for preset cifar10, found none"),
        (["--preset", "nice"], f"data: expected {DATA_HELP}, found none"),
        (["digits", "--preset", "fashion"], "n_bits: expected no such option for digits .*, found 8"),
        (["folder:small", "--preset", "emoji32"], "small/0.png: expected an image of at least 32x32, found 9x9"),
        (
            ["folder:small", "--preset", "nice", "--size", "9"],
            "image_shape: expected sides divisible by 2^n_levels = 2, found (3, 9, 9)",
        ),
        (
            ["folder:small", "--preset", "celeba256", "--size", "8"],
            "image_shape: expected sides divisible by 2^n_levels = 64, found (3, 8, 8)",
        ),
        (["--preset", "digits", "--resume"], "preset: expected none with --resume: .*, found 'digits'"),
        (["digits", "--class-weight", "-1"], "class_weight: expected a number, 0 or more, found -1.0"),
        (["digits", "--class-weight", "some"], "argument --class-weight: expected a number, found 'some' .*"),
        (["digits", "--class-weight", "nan"], "class_weight: expected a number, 0 or more, found nan"),
        (
            ["folder:small", "--size", "8", "--class-weight", "1", *SMALL],
            "class_weight: expected images with labels, found none in folder:small",
        ),
        (
            ["folder:small", "--size", "8", "--preset", "cifar10-classes", *SMALL],
            "class_conditional: expected images with labels, found none in folder:small",
        ),
        (["digits", "--class-weight", "1", "--cuda-graphs"], "cuda_graphs: expected class_weight 0 .*, found 1.0"),
        (["digits", "--beta2", "1"], "beta2: expected a number from 0 to below 1, found 1.0"),
        (["digits", "--list-presets=all"], "argument --list-presets: ignored explicit argument 'all' .*"),
    ],
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """One line, exit code 2, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    for i in range(4):
        Image.fromarray(np.full((9, 9, 3), 40 * i, dtype=np.uint8)).save(f"small/{i}.png")
    assert main(["train", *arguments, "--out", "out"]) == 2
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    found = capsys.readouterr()
    assert re.fullmatch(f"error: {pattern}\n", found.err), found.err
    assert found.out == ""
    assert not Path("out").exists()
