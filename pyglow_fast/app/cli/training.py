"""Runs the commands that train: train, resume, demo, ablate."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from pyglow_fast import presets
from pyglow_fast._core.errors import expect
from pyglow_fast._core.settings import GROUPS, Declared, declared_of, value_text
from pyglow_fast.app.cli._arguments import Commands, Function, command
from pyglow_fast.app.cli._output import say, say_error, say_next, table, user_input
from pyglow_fast.app.experiments.ablation import Ablation, variants
from pyglow_fast.data import DATA_HELP, DataConfig, Images, load_data
from pyglow_fast.models import GlowConfig
from pyglow_fast.train.config import LIMITS, TrainConfig, images_for, read_config
from pyglow_fast.train.loop import Result, resume, start
from pyglow_fast.train.page import duration
from pyglow_fast.train.ranks import Ranks, open_ranks, resolve_device
from pyglow_fast.train.run_folder import RunFolder

_DATA = tuple(item.name for item in fields(DataConfig) if item.name != "name")
_MODEL = tuple(item.name for item in fields(GlowConfig))
_TRAIN = tuple(item.name for item in fields(TrainConfig) if item.name not in ("data", "model"))
_SETTINGS = frozenset((*_DATA, *_MODEL, *_TRAIN))
# The settings that --help shows; --help-all shows all.
COMMON = (
    *("size", "class_conditional", "n_levels", "n_steps", "hidden"),
    *("batch_size", "lr", "max_steps", "max_minutes", "seed", "device"),
)
# The settings are those of the digits' preset, with classes. All steps fit into two minutes on two cores.
DEMO = {"class_conditional": True, "max_steps": 1500, "eval_every": 250, "sample_every": 250, "sample_count": 80}
LEAST_DEMO = 300  # steps, for samples that look like digits
_TYPES: dict[Any, tuple[Callable[[str], Any], str]] = {int: (int, "N"), float: (float, "X")}


def add(commands: Commands[Any]) -> None:
    """Declare the commands and their options."""
    parser = _trainer(commands, train, "train fashion-mnist --size 32 --out runs/fashion")
    text = "the folder of the run (default: with --config RUN/config.toml RUN-2, or the next that is free)"
    parser.add_argument("--out", default=None, metavar="DIR", help=text)
    text = "replace a run that is in --out"
    parser.add_argument("--overwrite", action="store_true", default=False, help=text)
    parser.set_defaults(resume=False)
    add_settings(parser)

    parser = _trainer(commands, go_on, "resume runs/fashion --max-minutes 30", sources=False)
    parser.add_argument("out", metavar="RUN", help="the folder of the run")
    parser.add_argument("data", metavar="DATA", nargs="?", default=None, help="the same images, if they were moved")
    parser.set_defaults(config=None, preset=None, overwrite=False, resume=True)
    add_settings(parser)

    parser = command(commands, demo, "demo", "--seed", "--device")
    text = "the folder of the run"
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in --out")
    parser.add_argument(
        "--minutes", type=float, metavar="X", default=2.0, help="at most so long; three times on a busy machine"
    )

    parser = _trainer(commands, ablate, "ablate fashion-mnist --n-steps 4 --hidden 48 --out runs/ablation")
    text = "a folder; runs that are finished in it are not trained again, others go on"
    parser.add_argument("--out", required=True, metavar="DIR", help=text)
    names: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    text = "what the models mix channels by; invconv_plain too"
    parser.add_argument("--permutations", default=["reverse", "shuffle", "invconv"], help=text, **names)
    parser.add_argument("--couplings", default=["additive", "affine"], help="affine, additive or both", **names)
    numbers: dict[str, Any] = {"nargs": "+", "type": int, "metavar": "N"}
    text = "how many of the K steps have checkerboard masks (default: as in the settings)"
    parser.add_argument("--checkerboards", default=None, help=text, **numbers)
    parser.add_argument("--seeds", default=[0, 1, 2], help="each model is trained once with each", **numbers)
    add_settings(parser, without=("permutation", "coupling", "seed", "n_checkerboard"))


class _ListPresets(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        say(presets.table(), lines=True)
        parser.exit()


class _Help(argparse.Action):
    """Prints the help and ends; of the settings it shows those in ``const``."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> None:
        for action in parser._actions:
            if action.dest in _SETTINGS and action.dest not in self.const:
                action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def _trainer(commands: Commands[Any], run: Function, example: str, sources: bool = True) -> argparse.ArgumentParser:
    """A command that has an option for each setting; one that is not given does not appear in the namespace."""
    usage = f"%(prog)s {'[DATA] --out DIR' if sources else 'RUN'} [options]"
    more: dict[str, Any] = {"argument_default": argparse.SUPPRESS, "add_help": False, "usage": usage}
    parser = command(commands, run, example, **more)
    every = {item.name for item in settings() if sources or item.rule.adjustable}
    helps = ((("-h", "--help"), every & {*COMMON}, "the options that most need"), (("--help-all",), every, "all"))
    for flags, shown, text in helps:
        parser.add_argument(*flags, action=_Help, nargs=0, const=shown, dest="help", help=f"show {text} and exit")
    parser.add_argument("--quiet", action="store_true", default=False, help="print the final figures only")
    if sources:
        parser.add_argument("data", metavar="DATA", nargs="?", default=None, help=DATA_HELP)
        text = (
            "settings of the paper's models and of small ones (of digits: digits); options and --config come before. "
            f"Without one a CPU gets a model that fits --max-minutes ({presets.MINUTES:g} if no limit is given)"
        )
        parser.add_argument("--preset", default=None, metavar="NAME", help=text)
        parser.add_argument("--list-presets", action=_ListPresets, nargs=0, help="show the presets and exit")
        text = "settings from a TOML file, such as another run's config.toml; options come before them"
        parser.add_argument("--config", default=None, metavar="FILE", help=text)
    return parser


def settings() -> Iterator[Declared]:
    """The settings that have an option, in the order of the groups."""
    found = [item for section in (DataConfig, GlowConfig, TrainConfig) for item in declared_of(section).values()]
    for group in GROUPS:
        yield from (item for item in found if item.rule.group == group)


def default_text(item: Declared) -> str:
    """Say the value of a setting that neither option, file nor preset gives."""
    value = presets.RECIPE.get(item.name, item.default)
    return item.rule.absent if value is None and item.rule.absent else value_text(value)


def add_settings(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Declare an option for each setting."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for item in (item for item in settings() if item.name not in without):
        text = f"{item.rule.help} (default: {default_text(item)})".replace("%", "%%")
        parse, metavar = _TYPES.get(item.type, (str, "NAME"))
        how: dict[str, Any] = {"type": _or_none(parse) if item.optional else parse, "metavar": metavar}
        if item.type is bool:
            how = {"action": argparse.BooleanOptionalAction if item.rule.other is None else "store_true"}
            how["default"] = argparse.SUPPRESS
        group: Any = groups[item.rule.group]
        group = group if item.rule.other is None else group.add_mutually_exclusive_group()
        group.add_argument(item.flag, dest=item.name, help=text, **how)
        if item.rule.other is not None:
            flag, words = item.rule.other
            opposite = False if item.type is bool else None
            group.add_argument(flag, action="store_const", const=opposite, dest=item.name, help=words)


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Read a value, or "none", which takes back what a file or a preset says of a setting that may be absent."""
    return lambda text: None if text == "none" else parse(text)


def from_file(path: str) -> tuple[dict[str, Any], str | None, str | None]:
    """Read (settings as if they were given as options, name of the images, preset) from a configuration file."""
    rest = read_config(Path(path))
    preset, data, model = (rest.pop(name, empty) for name, empty in (("preset", None), ("data", {}), ("model", {})))
    tables = ("", rest, _TRAIN), (": data", data, ("name", *_DATA)), (": model", model, _MODEL)
    for place, values, known in tables:
        expect(isinstance(values, Mapping), f"{path}{place}", "a table", type(values).__name__)
        unknown = ", ".join(sorted(set(values) - set(known)))
        expect(not unknown, f"{path}{place}", f"settings among {', '.join(sorted(known))}", unknown)
    images = data.get("name")
    for name, text in (("preset", preset), ("data.name", images)):
        expect(text is None or isinstance(text, str), f"{path}: {name}", "a text", text)
    return {key: value for key, value in {**rest, **data, **model}.items() if key != "name"}, images, preset


def gathered(args: argparse.Namespace) -> tuple[dict[str, Any], str | None, str | None]:
    """Collect (settings, name of the images, preset) from the options, and behind them from the file of --config."""
    options = {key: value for key, value in vars(args).items() if key in _SETTINGS}
    if args.config is None:
        return options, args.data, args.preset
    settings, data, preset = from_file(args.config)
    if any(limit in options for limit in LIMITS):
        settings = {key: value for key, value in settings.items() if key not in LIMITS}
    return settings | options, args.data or data, args.preset or preset


def make_config(
    given: dict[str, Any], name: str, preset: str | None = None, fitted: bool = False
) -> tuple[TrainConfig, Images]:
    """Make the configuration for what was given, and load the images that decide its shape.

    Without a preset a model that is ``fitted`` on a CPU is one that trains there, see presets.on_cpu.
    """
    preset = "digits" if preset is None and name == "digits" else preset
    values = presets.resolve(presets.RECIPE if preset is None else presets.find(preset).settings, given)
    data_config = DataConfig(name, **{key: values[key] for key in _DATA if key in values})
    conditional, weight = values.get("class_conditional", False), values.get("class_weight", 0.0)
    expect(type(conditional) is bool, "class_conditional", "true or false", conditional)
    data = load_data(data_config)
    if fitted and preset is None and resolve_device(values.get("device", "auto")).type == "cpu":
        values = presets.resolve(presets.on_cpu(data.image_shape[-1], given.get("max_minutes")), given)
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


def next_out(config: str | None) -> str:
    """Name the folder of a run that repeats the one with that config.toml: beside it, under a number."""
    run = RunFolder(Path(config or "").parent)
    expect(config is not None and run.config == Path(config), "out", "the folder of the run (--out DIR)", "none")
    place, number = run.path.resolve(), 2
    while place.with_name(f"{place.name}-{number}").exists():
        number += 1
    return os.path.relpath(place.with_name(f"{place.name}-{number}"))


def train(args: argparse.Namespace) -> int:
    """Train a Glow on images; under torchrun, on several processes."""
    began = time.monotonic()  # max_minutes bounds all that follows
    with user_input():
        given, data, preset = gathered(args)
        if preset is not None:
            data = images_for(preset, data)
        expect(args.resume or data is not None, "data", DATA_HELP, "none")
        out = args.out or next_out(None if args.resume else args.config)
        device = given.get("device")
        if device is None:
            device = RunFolder(out).read_config().device if args.resume else "auto"
        resolve_device(device)
        group = open_ranks(device)
    with group as ranks:
        if ranks.first and args.out is None and not args.quiet:
            say(f"the run goes to {out}, since no --out is given")
        return _execute(args, given, data, preset, out, ranks, began)


def go_on(args: argparse.Namespace) -> int:
    """Go on with a run from its last checkpoint; settings that may change are options."""
    return train(args)


def _execute(
    args: argparse.Namespace,
    given: dict[str, Any],
    data: str | None,
    preset: str | None,
    out: str,
    ranks: Ranks,
    began: float,
) -> int:
    """Apart from ``train``, so that nothing of the training is left when the ranks part."""
    with user_input():
        if args.resume:
            ready = resume(out, data, ranks=ranks, **given)
        else:
            config, images = make_config(given, data or "", preset, fitted=True)
            model, shape = config.model, "x".join(map(str, config.model.image_shape[1:]))
            if preset is None and data != "digits" and ranks.first and not args.quiet:
                sizes = f"L {model.n_levels}, K {model.n_steps}, hidden {model.hidden}, batch {config.batch_size}"
                say(
                    f"a model for {shape} images without a preset: {sizes} (--list-presets has others, larger ones too)"
                )
            ready = start(config, out, args.overwrite, images, ranks)
    result = ready.execute(args.quiet, began)
    return finish(result, ready.folder) if ranks.first else 128 + result.stopped_by if result.stopped_by else 0


def finish(result: Result, folder: RunFolder, least: int = 1) -> int:
    """Report how a run ended; returns the exit code, 1 for fewer than ``least`` steps and 128 + N after signal N."""
    path = str(folder.path)
    if result.stopped_by is not None:
        say(f"the run in {path} stopped at step {result.step}, saved")
        say_next("resume", path)
        return 128 + result.stopped_by
    early = ", early: the held-out score stopped improving" if result.stopped_early else ""
    say(f"{result.step} steps in {duration(result.seconds)}{early}")
    for count, what in (
        (result.skipped, "steps without an update, since loss or gradient were not finite"),
        (result.unreadable, "images that could not be read, with others in their places"),
    ):
        if count:
            say(f"{count} {what}")
    if result.held_out is not None and result.train is not None:
        before = {} if result.before is None else {"held-out, untrained": result.before}
        scores = before | {"held-out": result.held_out, "train": result.train}
        say(table(scores, result.yardsticks), lines=True)
        say(result.advice)
    say(folder.samples)
    say(folder.page)
    if result.step < least:
        say_error(
            f"{result.step} steps in {duration(result.seconds)}: expected {least} or more, in which a model learns"
        )
        say_next("resume", path, "--max-minutes", f"{result.seconds / 60 + presets.MINUTES:.0f}")
        return 1
    say_next("sample", path)
    say_next("serve", path)
    return 0


def demo(args: argparse.Namespace) -> int:
    """Train on handwritten digits for two minutes at most, and show the result."""
    began, given = time.monotonic(), DEMO | {"max_minutes": args.minutes, "seed": args.seed, "device": args.device}
    with user_input():
        config, data = make_config(given, "digits")
        ready = start(config, args.out, args.overwrite, data)
    say(f"training on {len(ready.state.train)} handwritten digits; {len(ready.state.held_out)} are held out")
    result = ready.execute(began=began)
    most = float(f"{3 * args.minutes:.3g}")
    if result.stopped_by is None and result.step < LEAST_DEMO and result.seconds < 60 * most:
        said = f"{result.step} steps in {duration(result.seconds)}"
        say(f"{said} are too few for samples: the demo takes up to {most:g} minutes")
        ready = resume(args.out, max_minutes=most, max_steps=LEAST_DEMO)
        result = ready.execute()
    return finish(result, ready.folder, LEAST_DEMO)


def ablate(args: argparse.Namespace) -> int:
    """Train permutations x couplings over several seeds, and compare their held-out bits/dim."""
    with user_input():
        world = os.environ.get("WORLD_SIZE", "1")
        expect(world == "1", "WORLD_SIZE", "1, since the runs follow one another in one process", repr(world))
        given, name, preset = gathered(args)
        name = name if preset is None else images_for(preset, name)
        expect(name is not None, "data", DATA_HELP, "none")
        given |= {"permutation": args.permutations[0], "coupling": args.couplings[0], "seed": args.seeds[0]}
        if args.checkerboards:
            given["n_checkerboard"] = args.checkerboards[0]
        base, data = make_config(given, name or "", preset)
        configs = variants(base, args.permutations, args.couplings, args.seeds, args.checkerboards)
        ablation = Ablation(configs, args.out, data)
    signum = ablation.execute(args.quiet)
    say(f"\n{ablation.write()}", lines=True)
    if signum is not None:
        say(f"stopped; the same command goes on in {args.out}")
        return 128 + signum
    for path in ablation.files:
        say(path)
    return 1 if ablation.failures else 0
