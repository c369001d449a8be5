"""Settings of ``train``: what the help says of them, and what becomes of options, files and presets together."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pyglow_fast import presets
from pyglow_fast._settings import value_text
from pyglow_fast.cli import main
from pyglow_fast.cli.app import parser
from pyglow_fast.cli.training import default_text, from_file, make_config, settings
from pyglow_fast.data import DATA_HELP, DataConfig
from pyglow_fast.models import GlowConfig
from pyglow_fast.train import RunFolder, TrainConfig, read_config

Capture = pytest.CaptureFixture[str]
SETTINGS = {item.name: item for item in settings()}
SMALL = ["--n-levels", "1", "--n-steps", "1", "--hidden", "4"]


def commands() -> dict[str, argparse.ArgumentParser]:
    """Each subcommand's parser."""
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def shown(command: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action, str]]:
    """(option, action, help as it is printed, on one line) of all options that the help shows."""
    for action in command._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS and action.dest != "help":
            yield action.option_strings[0], action, " ".join(command._get_formatter()._expand_help(action).split())


@pytest.mark.parametrize("name", list(commands()))
def test_the_help_tells_the_true_defaults(name: str) -> None:
    """Those that a parser has; of a setting what its class has, or the preset of the digits."""
    for option, action, text in shown(commands()[name]):
        found = re.search(r"\(default: (.*)\)$", text)
        if name in ("train", "compare", "resume") and action.dest in SETTINGS:
            other = SETTINGS[action.dest].rule.other
            wanted = None if other and option == other[0] else default_text(SETTINGS[action.dest])
            assert (found and found[1]) == wanted, option
        elif not isinstance(action.default, bool) and action.default not in (None, argparse.SUPPRESS):
            assert found is not None, option
            assert found[1] == value_text(action.default), option


@pytest.mark.parametrize("item", SETTINGS.values(), ids=list(SETTINGS))
def test_the_settings_taken_are_those_that_the_help_tells(item: Any) -> None:
    """What ``train`` makes of no options at all, on the digits and on others' images."""
    plain, _, digits = default_text(item).partition("; digits: ")
    taken, _ = make_config({}, "digits")
    here = {**vars(taken.data), **vars(taken.model), **vars(taken)}[item.name]
    if item.name == "n_bits":  # the one setting that the digits do not take
        assert (plain, digits) == ("8", "the digits have 17 grey levels") or plain.startswith("8;")
        return
    bare = {**vars(DataConfig()), **vars(GlowConfig()), **vars(TrainConfig())}[item.name]
    assert plain == (item.rule.absent or "none" if bare is None else value_text(bare))
    assert (digits or plain) == (item.rule.absent or "none" if here is None else value_text(here))


@pytest.mark.parametrize("text", ["-1e-1", "-1E5", "-.5e+3", "-1.", "-2", "-1_0.5e-1", "-inf", "-nan"])
@pytest.mark.parametrize(
    ("command", "field"),
    [("train digits --lr {}", "lr"), ("manipulate RUN --plus a --strengths 1 {} 2", "strengths")],
)
def test_negative_numbers_in_any_notation(command: str, field: str, text: str) -> None:
    value = getattr(parser().parse_args(shlex.split(command.format(text))), field)
    assert repr(value[1] if isinstance(value, list) else value) == repr(float(text))


@pytest.mark.parametrize("text", ["--1", "-e5", "-infinite"])
def test_what_is_no_number_is_an_option(text: str, capsys: Capture) -> None:
    assert main(["manipulate", "RUN", "--plus", "a", "--strengths", text]) == 2
    assert "--strengths: expected at least one argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "data"),
    [("evaluate r --seed 1 digits", "digits"), ("ood r mnist", None), ("ood r digits mnist", "digits")],
)
def test_data_may_be_left_out_or_stand_behind_options(words: str, data: str | None) -> None:
    assert parser().parse_args(shlex.split(words)).data == data


def from_file_alone(path: Path) -> TrainConfig:
    given, name, preset = from_file(str(path))
    return make_config(given, name or "digits", preset)[0]


def test_command_line_and_file_say_the_same(tmp_path: Path) -> None:
    """One variant both ways, with a classifier; what the folder holds is resolved and repeats the run."""
    options = "--coupling additive --permutation shuffle --n-levels 1 --n-steps 2 --hidden 4 --no-learn-prior"
    options += " --class-weight 0.1 --beta2 0.99 --max-steps 1 --quiet"
    path = tmp_path / "variant.toml"
    path.write_text(
        'preset = "digits"\nclass_weight = 0.1\nbeta2 = 0.99\nmax_steps = 1\n[model]\nlearn_prior = false\n'
        'coupling = "additive"\npermutation = "shuffle"\nn_levels = 1\nn_steps = 2\nhidden = 4\n'
    )
    assert main(["train", "--preset", "digits", *options.split(), "--out", str(tmp_path / "told")]) == 0
    told = RunFolder(tmp_path / "told").load().config
    assert from_file_alone(path) == told
    assert (told.model.coupling, told.model.classify, told.model.learn_prior) == ("additive", 10, False)
    assert (told.optimizer, told.weight_decay, told.max_steps, told.decay_steps) == ("adamw", 0.3, 1, 1)
    assert from_file_alone(tmp_path / "told" / "config.toml") == told


def test_options_come_before_the_file_and_both_before_a_preset(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("preset: cifar10\nmax_steps: 50\nlr: 0.5\nseed: 3\nmodel: {n_steps: 3}\ndata: {name: digits}\n")
    command = ["train", "--config", str(path), "--out", str(tmp_path / "r"), "--preset", "digits", "--quiet", *tiny]
    assert main([*command, "--lr", "0.001", "--max-epochs", "1", "--batch-size", "800"]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert (config.lr, config.seed, config.model.n_steps) == (0.001, 3, 2)
    assert (config.max_steps, config.max_epochs) == (None, 1)  # a limit replaces those of file and preset
    assert (config.optimizer, config.weight_decay) == ("adamw", 0.3)  # of the option's preset, not of the file's


def test_none_takes_back_what_a_file_says(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("patience = 3\nthreads = 2\nmax_steps = 1\ndata.held_out = 0.2\n")
    command = ["train", "digits", "--config", str(path), "--out", str(tmp_path / "r"), "--quiet", *tiny]
    assert main([*command, "--patience", "none", "--threads", "none", "--held-out", "none"]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert (config.patience, config.threads, config.data.held_out, config.max_steps) == (None, None, None, 1)


def test_every_option_ends_in_the_file(tiny: list[str], tmp_path: Path) -> None:
    options = (
        "--memory checkpoint --precision fp32 --no-ema --accumulate 2 --max-skipped 3 --patience 7 --flip --size 10"
    )
    options += " --crop-margin 2 --clip 5 --max-steps 2 --net-actnorm --held-out 0.3"
    assert main(["train", "digits", "--out", str(tmp_path / "r"), "--quiet", *options.split(), *tiny]) == 0
    values = read_config(tmp_path / "r" / "config.toml")
    expected = {"memory": "checkpoint", "precision": "fp32", "ema_decay": None, "accumulate": 2, "max_skipped": 3}
    expected |= {"patience": 7, "clip_norm": 5.0, "max_steps": 2}
    assert {name: values[name] for name in expected} == expected
    of_data = {"flip": True, "crop_margin": 2, "size": 10, "held_out": 0.3}
    assert {name: values["data"][name] for name in of_data} == of_data
    assert (values["model"]["net_actnorm"], values["model"]["image_shape"]) == (True, [1, 10, 10])


@pytest.mark.parametrize("name", ["nice", "realnvp", "digits"])
def test_the_command_and_python_make_the_same_of_a_preset(name: str) -> None:
    config, _ = make_config({"n_levels": 1}, "digits", name)
    assert config == TrainConfig.preset(name, "digits", n_levels=1, image_shape=(1, 8, 8))


def test_the_list_of_presets(capsys: Capture) -> None:
    assert main(["train", "--list-presets"]) == 0
    assert capsys.readouterr().out == presets.table() + "\n"


MEMORY = 'memory: expected one of ("reversible", "checkpoint", "store") or bytes such as "4GB"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data = 3", "x.toml: data: expected a table, found int"),
        ("[data]\nsides = 3", "x.toml: data: expected settings among .*, found sides"),
        ("[data]\nname = 3", "x.toml: data.name: expected a text, found 3"),
        ("preset = 3", "x.toml: preset: expected a text, found 3"),
        ("[model]\ndepth = 3", "x.toml: model: expected settings among .*, found depth"),
        ("[model]\nhidden = 'wide'", "hidden: expected a positive whole number, found 'wide'"),
        ("[model]\nimage_shape = [3, 8, 8]", "image_shape: expected (1, 8, 8), as the images have it, found (3, 8, 8)"),
        ("[model]\nn_classes = 10", "n_classes: expected None, as the images have it, found 10"),
        ("lr = 'fast'", "lr: expected a positive number, found 'fast'"),
        ("memory = 0.5", f"{MEMORY}, found 0.5"),
        ("class_conditional = 1", "class_conditional: expected true or false, found 1"),
        ("max_steps = 'none'\nmax_epochs = 0", "max_epochs: expected a positive whole number, or none, found 0"),
        ("tensorboard = 'yes'", "tensorboard: expected true or false, found 'yes'"),
    ],
)
def test_a_file_is_refused(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(text)
    assert_refused(["digits", "--config", "x.toml"], message, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset cifar10", "data: expected cifar10:PATH for preset cifar10, found none"),
        ("--preset nice", f"data: expected {DATA_HELP}, found none"),
        ("digits --preset fashion", "n_bits: expected no such option for digits .*, found 8"),
        ("folder:small --preset emoji32", "small/0.png: expected an image of at least 32x32, found 9x9"),
        ("--preset digits --resume", "preset: expected none with --resume: .*, found 'digits'"),
        ("digits --class-weight nan", "class_weight: expected a number, 0 or more, found nan"),
        ("folder:small --size 8 --class-weight 1", "class_weight: expected images with labels, found none in .*"),
        ("folder:small --size 8 --class-conditional", "class_conditional: expected images with labels, found none .*"),
        ("digits --class-weight 1 --cuda-graphs", "cuda_graphs: expected no accumulation, .*found one of them"),
        ("digits --beta2 1", "beta2: expected a number from 0 to below 1, found 1.0"),
        ("digits --max-steps 3 --memory 1kB", "memory: expected at least .*, found .*"),
    ],
)
def test_settings_are_refused(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    for i in range(4):
        Image.fromarray(np.full((9, 9, 3), 40 * i, dtype=np.uint8)).save(f"small/{i}.png")
    small = [] if "memory" in words or "preset" in words else SMALL
    assert_refused([*words.split(), *small], message, capsys)


def assert_refused(words: list[str], message: str, capsys: Capture) -> None:
    """One line, exit code 2, and nothing is made."""
    assert main(["train", *words, "--out", "out"]) == 2
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    found = capsys.readouterr()
    assert re.fullmatch(f"error: {pattern}\n", found.err), found.err
    assert found.out == ""
    assert not Path("out").exists()
