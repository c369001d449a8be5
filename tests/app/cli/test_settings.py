"""Settings of ``train``: what the help says of them, and what becomes of options, files and presets together."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from support.program import pyglow_fast

from pyglow_fast._core.settings import value_text
from pyglow_fast.app.cli import main
from pyglow_fast.app.cli.app import parser
from pyglow_fast.app.cli.training import default_text, from_file, make_config, settings
from pyglow_fast.train import RunFolder, TrainConfig

SETTINGS = {item.name: item for item in settings()}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Each subcommand's parser."""
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


@pytest.mark.parametrize("name", list(commands()))
def test_the_help_tells_the_true_defaults(name: str) -> None:
    """Those that a parser has; of a setting what its class has."""
    command = commands()[name]
    for action in command._actions:
        if not action.option_strings or action.help is argparse.SUPPRESS or action.dest == "help":
            continue
        option, text = action.option_strings[0], " ".join(command._get_formatter()._expand_help(action).split())
        found = re.search(r"\(default: (.*)\)$", text)
        if name in ("train", "ablate", "resume", "data") and action.dest in SETTINGS:
            other = SETTINGS[action.dest].rule.other
            wanted = None if other and option == other[0] else default_text(SETTINGS[action.dest])
            assert (found and found[1]) == wanted, option
        elif not isinstance(action.default, bool) and action.default not in (None, argparse.SUPPRESS):
            assert found is not None, option
            assert found[1] == value_text(action.default), option


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
    assert (told.optimizer, told.weight_decay, told.max_steps, told.decay_steps) == ("adamw", 0.3, 1, 0)
    assert from_file_alone(tmp_path / "told" / "config.toml") == told


def test_options_come_before_the_file_and_both_before_a_preset(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('preset = "cifar10"\nmax_steps = 50\nlr = 0.5\nseed = 3\nmodel.n_steps = 3\ndata.name = "digits"\n')
    command = ["train", "--config", str(path), "--out", str(tmp_path / "r"), "--preset", "digits", "--quiet", *tiny]
    assert main([*command, "--lr", "0.001", "--max-epochs", "1", "--batch-size", "800"]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert (config.lr, config.seed, config.model.n_steps) == (0.001, 3, 2)
    assert (config.max_steps, config.max_epochs) == (None, 1)  # a limit replaces those of file and preset
    assert (config.optimizer, config.weight_decay) == ("adamw", 0.3)  # of the option's preset, not of the file's


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
def test_a_file_is_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, exit code 2, and nothing is made."""
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(text)
    ended = pyglow_fast("train", "digits", "--config", "x.toml", "--out", "out")
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.fullmatch(f"error: {pattern}\n", ended.err), ended.err
    assert (ended.code, ended.out) == (2, "")
    assert not Path("out").exists()
