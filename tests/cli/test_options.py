"""The options of all commands: help texts tell the true defaults, numbers may be negative."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyglow_fast._settings import value_text
from pyglow_fast.cli import main
from pyglow_fast.cli._train_options import default_text, options
from pyglow_fast.cli.app import parser
from pyglow_fast.cli.interpolate import PAIRS
from pyglow_fast.cli.manipulate import STRENGTHS, TONE_STRENGTHS
from pyglow_fast.cli.train import make_config
from pyglow_fast.data import DataConfig
from pyglow_fast.interop.convert import save_chaiyujin
from pyglow_fast.latents import DEFAULT_SPACE
from pyglow_fast.models import GlowConfig
from pyglow_fast.presets import PRESETS
from pyglow_fast.train import RunFolder, TrainConfig, class_columns
from pyglow_fast.train.figures import pictures

SETTINGS = {item.name: item for item in options()}
IN_TRAIN = ("train", "compare")  # whose options are settings, and beside them a few more


def commands() -> dict[str, argparse.ArgumentParser]:
    """Each subcommand's parser."""
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def shown(command: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action, str]]:
    """(option, action, help as it is printed, on one line) of all options that the help shows."""
    for action in command._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS and action.dest != "help":
            text = command._get_formatter()._expand_help(action)
            yield action.option_strings[0], action, " ".join(text.split())


ALL = [
    pytest.param(name, option, action, text, id=f"{name} {option}")
    for name, command in commands().items()
    for option, action, text in shown(command)
]


def printed(text: str) -> str | None:
    """The default that a help text names, if it does."""
    found = re.search(r"\(default: (.*)\)$", text)
    return None if found is None else found[1]


# Where a default is none that a parser could have, since it depends on something: what the help says of it. The words
# that hold a number are put together from it.
COMPUTED: dict[str, str] = {
    "--part": "held-out of the run's own images, all of any others",
    "--columns": "a column for each of up to 16 classes, else about a square",
    "--label": "all classes in turn",
    "edit --label": "its own; of a file the likeliest",
    "--scale": "to 64 pixels high",
    "--labels": "their own",
    "--pairs": str(PAIRS),
    "interpolate --space": f"{DEFAULT_SPACE}, with --from that of the command edit",
    "edit --space": "noise; for a model with classes latent, since noise holds little of the class",
    "edit --keep": "all",
    "levels --keep": "the deepest, the deepest two, ...",
    "--strengths": f"{value_text(STRENGTHS)}; with --tone: {value_text(TONE_STRENGTHS)}",
    "--levels": "all",
    "--train-images": "all",
    "--port": "the first free one from 7860",
    "data --to": "one in the cache",
    "convert --batch-size": "1",
    "train --out": "with --config RUN/config.toml RUN-2, or the next that is free",
    "--checkerboards": "as in the settings",
}


@pytest.mark.parametrize(("name", "option", "action", "text"), ALL)
def test_the_help_tells_the_true_default(name: str, option: str, action: argparse.Action, text: str) -> None:
    default = printed(text)
    assert "default" not in text.replace(f"(default: {default})", ""), "named in another way, by hand"
    if name in IN_TRAIN and action.dest in SETTINGS:
        other = SETTINGS[action.dest].rule.other
        assert default == (None if other and option == other[0] else default_text(SETTINGS[action.dest]))
    elif any(action.default is value for value in (None, False, True, argparse.SUPPRESS)):
        words = COMPUTED.get(f"{name} {option}", COMPUTED.get(option) if action.nargs != 0 else None)
        assert default in (None, words)
    else:
        assert default is not None
        parse: Callable[[str], Any] = action.type if callable(action.type) else str
        given = [parse(part) for part in default.split()] if action.nargs == "+" else parse(default)
        assert given == action.default


def test_all_words_of_computed_defaults_are_in_use() -> None:
    texts = {printed(text) for command in commands().values() for _, _, text in shown(command)}
    assert [words for words in COMPUTED.values() if words not in texts] == []


@pytest.mark.full
def test_numbers_in_words_of_computed_defaults() -> None:
    """Those that the words hold and no parser has."""
    gradio = pytest.importorskip("gradio.http_server", exc_type=ImportError)
    assert gradio.INITIAL_PORT_VALUE == 7860
    assert pictures(torch.zeros(1, 1, 8, 8), 17).shape[-2:] == (256, 256)
    assert [class_columns(100, count) for count in (16, 17)] == [16, None]
    assert inspect.signature(save_chaiyujin).parameters["batch_size"].default == 1


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
    assert bare is None or isinstance(bare, bool | str) or type(bare)(plain) == bare
    assert (digits or plain) == (item.rule.absent or "none" if here is None else value_text(here))


def test_every_setting_with_an_option_is_in_the_help() -> None:
    for name in IN_TRAIN:
        found = {action.dest for _, action, _ in shown(commands()[name])}
        varied = {"permutation", "coupling", "seed", "n_checkerboard"} if name == "compare" else set()
        assert set(SETTINGS) - found - varied == set()


NUMBERS = ("-1e-1", "-1E5", "-.5e+3", "-1.", "-2", "-0.25", "-1_0.5e-1", "-inf", "-nan")


@pytest.mark.parametrize("text", NUMBERS)
@pytest.mark.parametrize(
    ("command", "field"),
    [
        ("train digits --lr {}", "lr"),
        ("compare digits --out x --scale-bias {}", "scale_bias"),
        ("manipulate RUN DATA --out x.png --strengths 1 {} 2", "strengths"),
        ("interpolate RUN --out x.png --at {}", "at"),
        ("temperatures RUN --out x.png --temperatures {}", "temperatures"),
        ("demo --out x --minutes {}", "minutes"),
    ],
)
def test_negative_numbers_in_any_notation(command: str, field: str, text: str) -> None:
    args = parser().parse_args(shlex.split(command.format(text)))
    value = getattr(args, field)
    found = value[len(value) // 2] if isinstance(value, list) else value
    assert repr(found) == repr(float(text))


def test_the_number_of_edit_may_be_negative() -> None:
    args = parser().parse_args(shlex.split("edit RUN 0 --out x.png --add a b -1e-1 --keep -1e-1 1"))
    assert (args.add, args.keep) == ([["a", "b", "-1e-1"]], [-0.1, 1.0])


@pytest.mark.parametrize("text", ["-1x", "--1", "-e5", "-1e", "-infinite", "-x"])
def test_what_is_no_number_is_an_option(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manipulate", "RUN", "DATA", "--out", "x.png", "--strengths", text]) == 2
    assert capsys.readouterr().err.startswith("error: argument --strengths: expected at least one argument (see ")


SMALL = ["--n-steps", "1", "--hidden", "4", "--max-steps", "1", "--eval-images", "8", "--sample-count", "4"]


def test_a_file_beside_a_preset_says_which_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text('preset = "fashion"\nlr = 0.5\n[model]\nhidden = 4\n[data]\nname = "digits"\n')
    assert main(["train", "--config", "x.toml", "--preset", "digits", *SMALL, "--out", "run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "x.toml names preset fashion; --preset digits takes its place",
        "x.toml wins over preset digits in hidden, lr",
    ]
    config = RunFolder("run").load().config
    assert (config.lr, config.model.hidden, config.optimizer) == (0.5, 4, "adamw")
    assert main(["train", "--config", "x.toml", "--preset", "digits", *SMALL, "--out", "r", "--quiet"]) == 0
    assert "wins" not in capsys.readouterr().out


def test_a_preset_of_which_a_file_leaves_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *SMALL, "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["train", "--config", "run/config.toml", "--preset", "digits", "--out", "again"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        "error: preset: expected one with settings that run/config.toml does not have, since those of a file win, "
        "found 'digits'\n"
    )
    assert not Path("again").exists()


def test_a_limit_in_a_file_takes_away_those_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a preset may leave nothing though it has settings that the file lacks; what agrees is not told."""
    monkeypatch.chdir(tmp_path)
    file = Path("x.toml")
    file.write_text('max_minutes = 0.5\nbatch_size = 64\n[data]\nname = "digits"\n')
    command = ["train", "--config", "x.toml", "--preset", "digits", "--out", "run"]
    assert main([*command, *SMALL]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "x.toml wins over preset digits in decay_steps, max_steps"
    rest = {key: value for key, value in PRESETS["digits"].settings.items() if key not in ("max_steps", "decay_steps")}
    own = {key: "none" if value is None else value for key, value in rest.items()}
    model = {key: own.pop(key) for key in list(own) if key in GlowConfig.__dataclass_fields__}
    lines = [*(f"{key} = {json.dumps(value)}" for key, value in own.items()), "max_minutes = 0.5", "[model]"]
    lines += [*(f"{key} = {json.dumps(value)}" for key, value in model.items()), "[data]", 'name = "digits"']
    file.write_text("\n".join(lines))
    assert main([*command[:-1], "other"]) == 2
    assert capsys.readouterr().err.startswith("error: preset: expected one with settings that x.toml does not have")
    assert not Path("other").exists()


def test_where_a_run_goes_is_said_before_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", *SMALL, "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    there: list[bool] = []
    shown_line = "the run goes to run-2, since no --out is given"
    real = print

    def watch(*words: object, **rest: Any) -> None:
        if words and words[0] == shown_line:
            there.append(Path("run-2").exists())
        real(*words, **rest)

    monkeypatch.setattr("builtins.print", watch)
    assert main(["train", "--config", "run/config.toml"]) == 0
    assert there == [False]
    assert capsys.readouterr().out.splitlines()[0] == shown_line
    assert RunFolder("run-2").exists
