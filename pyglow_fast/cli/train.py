"""Runs ``pyglow-fast train``: trains a new run, or the rest of one."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from pyglow_fast import presets
from pyglow_fast._errors import expect
from pyglow_fast.cli._common import folder_name, say, table, user_input
from pyglow_fast.cli._train_options import add_options
from pyglow_fast.data import DATA_HELP, DataConfig, Images, load_data
from pyglow_fast.models import GlowConfig
from pyglow_fast.train import (
    ADJUSTABLE,
    LIMITS,
    Ranks,
    Result,
    Run,
    RunFolder,
    TrainConfig,
    open_ranks,
    read_config,
    resolve_device,
    resume,
    start,
)
from pyglow_fast.train.config import images_for

_DATA = tuple(item.name for item in fields(DataConfig) if item.name != "name")
_MODEL = tuple(item.name for item in fields(GlowConfig))
_SPECIAL = ("run_command", "data", "out", "resume", "overwrite", "quiet", "command", "config", "preset")


class _ListPresets(argparse.Action):
    """Prints the table of presets and ends, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        say(presets.table(), lines=True)
        parser.exit()


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``train`` and its options."""
    about = "train a Glow on images; under torchrun, on several processes"
    parser = commands.add_parser("train", help=about, description=about, argument_default=argparse.SUPPRESS)
    parser.set_defaults(run_command=run)
    parser.add_argument("data", metavar="DATA", nargs="?", default=None, help=DATA_HELP)
    parser.add_argument(
        "--out",
        type=folder_name,
        default=None,
        metavar="DIR",
        help="the folder of the run (default: with --config RUN/config.toml RUN-2, or the next that is free)",
    )
    parser.add_argument(
        "--config",
        default=None,
        metavar="FILE",
        help="settings from a TOML, YAML or JSON file, such as another run's config.toml; options come before "
        "them, and they before those of --preset",
    )
    parser.add_argument(
        "--preset",
        default=None,
        metavar="NAME",
        help="settings of the paper's models and of small ones; options and --config come before them",
    )
    parser.add_argument("--list-presets", action=_ListPresets, nargs=0, help="show the presets and exit")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", default=False, help="go on from the last checkpoint in --out"
    )
    existing.add_argument("--overwrite", action="store_true", default=False, help="replace a run that is in --out")
    parser.add_argument("--quiet", action="store_true", default=False, help="print the final figures only")
    add_options(parser)


def next_out(config: str | None) -> str:
    """Name the folder of a run that repeats the one with that config.toml: beside it, under a number.

    Raises:
        ValueError: it is not that of a run, or none is given.
    """
    run = None if config is None else RunFolder(Path(config).parent)
    expect(run is not None and run.config == Path(config or ""), "out", "the folder of the run (--out DIR)", "none")
    assert run is not None
    place = run.path.resolve()
    number = 2
    while place.with_name(f"{place.name}-{number}").exists():
        number += 1
    return os.path.relpath(place.with_name(f"{place.name}-{number}"))


def from_file(path: str) -> tuple[dict[str, Any], str | None, str | None]:
    """Read (settings as if they were given as options, name of the images, preset) from a configuration file.

    Raises:
        ValueError: see read_config; or a key that is no setting.
    """
    tables = read_config(Path(path))
    preset = tables.pop("preset", None)
    expect(preset is None or isinstance(preset, str), f"{path}: preset", "a text", preset)
    flat: dict[str, Any] = {}
    for name, section in (("data", DataConfig), ("model", GlowConfig), ("config", TrainConfig)):
        values = tables if name == "config" else tables.get(name, {})
        expect(isinstance(values, Mapping), f"{path}: {name}", "a table", type(values).__name__)
        known = {item.name for item in fields(section)}
        unknown = sorted(set(values) - known)
        place = path if name == "config" else f"{path}: {name}"
        expect(not unknown, place, f"settings among {', '.join(sorted(known))}", ", ".join(unknown))
        flat |= {key: value for key, value in values.items() if key not in ("data", "model")}
    images = flat.pop("name", None)
    expect(images is None or isinstance(images, str), f"{path}: data.name", "a text", images)
    return flat, images, preset


class Given(NamedTuple):
    """The settings that were given by options and by a file.

    Args:
        settings: by name; an option comes before the file.
        data: name of the images, or None.
        preset: whose settings are behind these, or None.
        notes: for people: what of the preset does not count.
    """

    settings: dict[str, Any]
    data: str | None
    preset: str | None
    notes: tuple[str, ...] = ()


def gathered(args: argparse.Namespace, special: Collection[str]) -> Given:
    """Collect what the options say, and behind them the file of --config.

    Args:
        args: the parsed options, with data, preset and config.
        special: the names of other options that are no settings.

    Raises:
        ValueError: see from_file; or a preset beside a file that leaves nothing of it.
    """
    options = {key: value for key, value in vars(args).items() if key not in special}
    if args.config is None:
        return Given(options, args.data, args.preset)
    settings, data, preset = from_file(args.config)
    notes: tuple[str, ...] = ()
    if args.preset is not None:
        notes = _what_wins(args.config, settings, preset, args.preset)
        preset = args.preset
    if any(limit in options for limit in LIMITS):
        settings = {key: value for key, value in settings.items() if key not in LIMITS}
    return Given(settings | options, args.data or data, preset, notes)


def _what_wins(path: str, settings: Mapping[str, Any], named: str | None, preset: str) -> tuple[str, ...]:
    """List which settings of --preset do not count, for people.

    Args:
        path: the file of --config.
        settings: its own.
        named: the preset that it names, or None.
        preset: the one of the option, which takes that one's place.

    Raises:
        ValueError: the file has every setting that the preset has.
    """
    theirs = presets.find(preset).settings
    merged = presets.resolve(theirs, settings)
    changed = sorted(key for key, value in theirs.items() if merged.get(key) != value)
    expect(
        any(key not in settings and key not in changed for key in theirs),
        "preset",
        f"one with settings that {path} does not have, since those of a file win",
        repr(preset),
    )
    notes = [f"{path} names preset {named}; --preset {preset} takes its place"] if named not in (None, preset) else []
    if changed:
        notes.append(f"{path} wins over preset {preset} in {', '.join(changed)}")
    return tuple(notes)


def make_config(given: dict[str, Any], name: str, preset: str | None = None) -> tuple[TrainConfig, Images]:
    """Make the configuration for what was given, and load the images that decide its shape.

    Args:
        given: fields of DataConfig, GlowConfig and TrainConfig, by name.
        name: the name of the images.
        preset: the preset whose settings count where nothing is given; None: that of the digits for the digits, else
            none.

    Raises:
        ValueError: see DataConfig, GlowConfig and TrainConfig.
    """
    preset = "digits" if preset is None and name == "digits" else preset
    values = presets.resolve({} if preset is None else presets.find(preset).settings, given)
    data_config = DataConfig(name, **{key: values[key] for key in _DATA if key in values})
    conditional, weight = values.get("class_conditional", False), values.get("class_weight", 0.0)
    expect(type(conditional) is bool, "class_conditional", "true or false", conditional)
    data = load_data(data_config)
    for key, wanted in (("class_conditional", conditional), ("class_weight", weight)):
        expect(not wanted or data.labels is not None, key, "images with labels", f"none in {data.name}")
    n_classes = len(data.class_names)
    found = {"image_shape": data.image_shape, "n_classes": n_classes if conditional else None}
    found["classify"] = n_classes if weight else 0
    for key, value in found.items():
        given_value = tuple(given[key]) if isinstance(given.get(key), list) else given.get(key, value)
        expect(given_value == value, key, f"{value}, as the images have it", given_value)
    model = GlowConfig(**{key: values[key] for key in _MODEL if key in values} | found)
    rest = {key: value for key, value in values.items() if key not in (*_DATA, *_MODEL)}
    return TrainConfig(data=data_config, model=model, **rest), data


def resumed(given: dict[str, Any], name: str | None, out: str, ranks: Ranks) -> Run:
    """Make the run to go on with, after checking that whatever was given is as it was or may change.

    Raises:
        ValueError: see :func:`pyglow_fast.train.resume`.
    """
    stored = RunFolder(out).read_config()
    changes = {key: value for key, value in given.items() if key not in (*_DATA, *_MODEL)}
    changes |= {f"data.{key}": given[key] for key in _DATA if key in given and f"data.{key}" in ADJUSTABLE}
    for part, known in ((stored.data, _DATA), (stored.model, _MODEL)):
        for key in known:
            if key in given and f"data.{key}" not in changes:
                was, value = getattr(part, key), given[key]
                value = tuple(value) if isinstance(value, list) else value
                expect(value == was, key, f"{was!r}, as the run was started with", repr(value))
    return resume(out, name, ranks=ranks, **changes)


def summary(result: Result) -> str:
    """Write the final figures for people."""
    if result.held_out is None or result.train is None:
        return ""
    scores = {"held-out": result.held_out, "train": result.train}
    if result.before is not None:
        scores = {"held-out, untrained": result.before, **scores}
    return table(scores, result.yardsticks)


def finish(result: Result, folder: RunFolder) -> int:
    """Report how a run ended; returns the exit code, by shell convention 128 + N after signal N."""
    if result.stopped_by is not None:
        say(f"the run in {folder.path} stopped at step {result.step}; go on with --resume")
        return 128 + result.stopped_by
    early = ", early: the held-out score stopped improving" if result.stopped_early else ""
    say(f"{result.step} steps in {result.seconds:.0f} s{early}")
    for count, what in (
        (result.skipped, "steps without an update, since loss or gradient were not finite"),
        (result.unreadable, "images that could not be read, with others in their places"),
    ):
        if count:
            say(f"{count} {what}")
    say(summary(result), lines=True)
    say(folder.samples)
    say(folder.page)
    name = shlex.quote(str(folder.path))
    say(f"next: pyglow-fast sample {name} --out samples.png, or on a page: pyglow-fast serve {name}")
    return 0


def _run(args: argparse.Namespace, given: Given, out: str, ranks: Ranks, began: float) -> int:
    """Apart from ``run``, so that nothing of the training is left when the ranks part."""
    if ranks.first and not args.quiet:
        for note in given.notes:
            say(note)
    with user_input():
        if args.resume:
            ready = resumed(given.settings, given.data, out, ranks)
        else:
            assert given.data is not None  # see run
            config, data = make_config(given.settings, given.data, given.preset)
            ready = start(config, out, args.overwrite, data, ranks)
    result = ready.execute(args.quiet, began)
    return finish(result, ready.folder) if ranks.first else 128 + result.stopped_by if result.stopped_by else 0


def run(args: argparse.Namespace) -> int:
    """Train the model; returns the exit code."""
    began = time.monotonic()  # max_minutes bounds all that follows
    with user_input():
        given = gathered(args, _SPECIAL)
        if given.preset is not None:
            expect(not args.resume, "preset", "none with --resume: the run has its settings", repr(given.preset))
            given = given._replace(data=images_for(given.preset, given.data))
        expect(args.resume or given.data is not None, "data", DATA_HELP, "none")
        out = args.out or next_out(None if args.resume else args.config)
        if args.out is None:
            given = given._replace(notes=(*given.notes, f"the run goes to {out}, since no --out is given"))
        device = given.settings.get("device")
        if device is None:
            device = RunFolder(out).read_config().device if args.resume else "auto"
        resolve_device(device)
        group = open_ranks(device)
    with group as ranks:
        return _run(args, given, out, ranks, began)
