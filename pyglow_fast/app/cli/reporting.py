"""Runs the commands around a run: data, report, compare, info."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import write_bytes, write_text
from pyglow_fast._core.settings import declared_of
from pyglow_fast.app.cli._arguments import RUN_HELP, Commands, check_numbers, command, output_path
from pyglow_fast.app.cli._output import say, say_next, table, user_input
from pyglow_fast.app.cli.training import add_settings, settings
from pyglow_fast.app.experiments.compare import caveat, comparison_page, run_table
from pyglow_fast.app.studio import Draw, OpenRun
from pyglow_fast.app.studio.opened import find_run
from pyglow_fast.app.studio.words import TEMPERATURE, N
from pyglow_fast.data.config import DATA_HELP, SOURCES, DataConfig
from pyglow_fast.data.fetch import FETCHABLE, data_folder, fetch
from pyglow_fast.data.sources import SHIPPED
from pyglow_fast.data.yardsticks import look_over
from pyglow_fast.functional import info
from pyglow_fast.train import page_of
from pyglow_fast.train.figures import example_grid, png_bytes
from pyglow_fast.train.metrics import markdown_text


def add(commands: Commands[Any]) -> None:
    """Declare the commands and their options."""
    how: dict[str, Any] = {"defaults": {"n": N, "name": None, "to": None, "out": None}}
    how["argument_default"] = argparse.SUPPRESS  # settings that are not given do not appear
    parser = command(commands, data, "data folder:PICTURES --size 32 --out seen.png", "--n", "--seed", **how)
    text = f"what to look at: {DATA_HELP}. Of these {', '.join(FETCHABLE)} are fetched if they are not there"
    parser.add_argument("name", metavar="DATA", nargs="?", help=f"{text}. None: list these")
    parser.add_argument("--to", metavar="DIR", help="fetch, into this folder (default: one in the cache)")
    parser.add_argument("--out", metavar="PNG", help="where the picture goes (default: data.png)")
    add_settings(parser, without=[item.name for item in settings() if item.name not in declared_of(DataConfig)])

    parser = command(commands, report, "report runs/demo", "run")
    parser.add_argument(
        "--out", metavar="HTML", help="where the page goes (default: RUN/report.html, as after training)"
    )

    shared, defaults = ("--last", "--device", "--n", "--seed"), {"n": N}
    parser = command(commands, compare, "compare runs/demo shown --temperature 0.8", *shared, defaults=defaults)
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"{RUN_HELP}; two or more")
    text = "what multiplies the priors' deviation"
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, metavar="X", help=text)
    text = "where the page goes: a file, or a folder for compare.html (default: the current one)"
    parser.add_argument("--out", metavar="HTML", help=text)

    command(commands, versions, "info")


def data(args: argparse.Namespace) -> None:
    """Look at images before training: counts, files, a picture of what a model will see; or fetch a data set."""
    known = declared_of(DataConfig).keys() - {"name"}
    name, given = args.name, {key: value for key, value in vars(args).items() if key in known}
    with user_input():
        expect(args.to is None or name is not None, "to", "the name of a data set with it", "none")
        check_numbers(args)
        if name is None:
            say(_listing(), lines=True)
            return
        scheme = name.partition(":")[0]
        expect(scheme in SOURCES, "data", f"one of {DATA_HELP}", repr(name))
        if "on_unreadable" in SOURCES[scheme].options:
            given = {"on_unreadable": "skip"} | given  # a warning counts what is left out
        config, out = DataConfig(name, **given), output_path(args.out or "data.png", ".png", "out", name)
        if args.to is not None or name in FETCHABLE:
            folder, was_there = fetch(name, args.to)
            say(f"{name} {'was there and is whole' if was_there else 'fetched'}: {folder}")
            say(f"{FETCHABLE[name].licence} - {FETCHABLE[name].about}")
            config = config if args.to is None else replace(config, name=f"{name}:{folder}")
        lines, yardsticks, train = look_over(config, args.seed)
    say("\n".join([*lines, table({}, yardsticks)]), lines=True)
    write_bytes(out, png_bytes(example_grid(train, min(args.n, len(train)), args.seed, train.class_names)))
    say(out)
    say_next("train", config.name, "--out", f"runs/{scheme}")


def _listing() -> str:
    lines = []
    for name, item in FETCHABLE.items():
        there = data_folder() / name
        state = f"in {there}" if there.is_dir() else "not fetched"
        lines.append(f"{name}: {item.about}\n  {item.size}, {item.licence}, from {item.origin}; {state}")
    return "\n".join([*lines, f"the cache is {data_folder()}; set PYGLOW_DATA to move it"])


def report(args: argparse.Namespace) -> None:
    """Write one HTML page of a run, at its end or not: scores, curves, samples, settings."""
    with user_input():
        folder, _ = find_run(args.run)
        own = args.out is None and folder.path != SHIPPED  # nothing is written into the package
        out = folder.page if own else output_path(args.out or "report.html", ".html", "out")
        folder.read_config()  # whatever else a page could lack is no error
    write_text(out, page_of(folder))
    say(out)


def compare(args: argparse.Namespace) -> None:
    """Compare runs that are there: a table; on a page their curves and samples side by side too."""
    with user_input():
        check_numbers(args)
        draw, out = Draw(args.n, args.temperature, args.seed), Path(args.out or ".")
        places = {find_run(name)[0].path.resolve() for name in args.runs}
        expect(len(places) == len(args.runs) > 1, "runs", "two or more, each once", " ".join(args.runs))
        runs = [OpenRun.open(name, args.last, args.device) for name in args.runs]
        place = str(out / "compare.html" if out.is_dir() else out)
        out = output_path(place, ".html", "out", *(run.source for run in runs))
    say(markdown_text(run_table(runs)), lines=True)
    say(f"note: {caveat(runs)}")
    write_text(out, comparison_page(runs, draw))
    say(out)


def versions(args: argparse.Namespace) -> None:
    """Print versions, what was built, and which backend each op uses."""
    say(info.report(), lines=True)
