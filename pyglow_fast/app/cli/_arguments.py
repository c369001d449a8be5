"""Arguments that commands share: a run, its images, where the result goes; and the parser that reads them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pyglow_fast._core.errors import check_seed, did_you_mean, expect
from pyglow_fast._core.files import check_file
from pyglow_fast._core.settings import Range, value_text
from pyglow_fast.app.cli._output import say_error
from pyglow_fast.app.studio import OpenRun
from pyglow_fast.app.studio.opened import SHOWN
from pyglow_fast.app.studio.reading import PARTS
from pyglow_fast.data import DATA_HELP, optional
from pyglow_fast.data.sources import SHIPPED
from pyglow_fast.train import RunFolder
from pyglow_fast.train.figures import PICTURE_IMAGES

Function = Callable[[argparse.Namespace], int | None]  # what a command does; gives the exit code, or none for 0
Commands = argparse._SubParsersAction  # of argparse.ArgumentParser: where a command is declared
LOOSE = ("folder", "photos")  # images that are whatever lies below a folder: a file more there would be one of them
_RANGES = {
    "n": PICTURE_IMAGES,
    "columns": PICTURE_IMAGES,
    "scale": Range(least=1, most=256, why="a pixel of the image is then a picture of its own"),
    "frames": Range(least=2, most=1000, why="each is a pass through the model"),
    "batch_size": Range(least=1, most=1 << 16, why="all of them are in memory at once"),
}


COUNT: dict[str, Any] = {"type": int, "metavar": "N"}
RUN_HELP = f"the folder of a run, or {SHOWN}: the small model that comes with the package"
_SHARED: dict[str, dict[str, Any]] = {
    "run": {"metavar": "RUN", "help": RUN_HELP},
    "--last": {"action": "store_true", "help": "the newest checkpoint, not the one with the best held-out bits/dim"},
    "--device": {"default": "auto", "help": "cpu, cuda, cuda:N or auto"},
    "data": {"metavar": "DATA", "nargs": "?", "help": f"{DATA_HELP}; prepared as the run's own (default: those)"},
    "--part": {"choices": PARTS, "help": "which part (default: held-out of the run's own images, all of any others)"},
    "--out": {"metavar": "FILE", "help": "where the result goes (default: in the folder of the run)"},
    "--scale": COUNT | {"help": "enlarge each pixel by this factor (default: a picture to 256 pixels at least)"},
    "--n": COUNT | {"help": "how many images"},
    "--columns": COUNT | {"help": "images in a row (default: a column a class for up to 16, else a square)"},
    "--seed": COUNT | {"default": 0, "help": "of all that is random: the same seed gives the same result"},
    "--label": {"metavar": "CLASS", "action": "append", "help": "a class; may be repeated (default: all in turn)"},
    "--batch-size": COUNT | {"default": 64, "help": "images at a time"},
}
RUN = ("run", "--last", "--device")
IMAGES = (*RUN, "data", "--part")
PICTURE = ("--out", "--scale")


class HelpFormatter(argparse.HelpFormatter):
    """Writes behind the help of each option the default that it has, which nobody then types by hand."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, value = action.help or "", action.default
        if not action.option_strings or value is None or value is argparse.SUPPRESS or isinstance(value, bool):
            return text
        about = text.partition(" (default:")[0]  # in words, where the parser alone would have none
        return f"{about} (default: {value_text(value).replace('%', '%%')})".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help opens with what is done and an example.

    Options must be written out: an abbreviation that works today would be ambiguous with tomorrow's options.
    """

    def __init__(self, *args: Any, opening: str = "", **options: Any) -> None:
        ours: dict[str, Any] = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(*args, **ours | options)
        self.opening = opening

    def format_help(self) -> str:
        """Format the help of any parser, below the opening line."""
        return f"{self.opening}\n\n{super().format_help()}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a value as any parser does, and name the nearest of the choices in the error."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), action.choices or ())
            raise

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; DATA, which may be left out, may stand behind options.

        Before Python 3.13 argparse does not look for it there. What nothing takes is refused here, where the options of
        the command are known.
        """
        found, rest = super().parse_known_args(args, namespace)
        last = next((action for action in self._actions if action.metavar == "DATA"), None)
        options = [word for word in rest if word.startswith("-")]
        if last is not None and rest and not options and not getattr(found, last.dest):
            several = last.nargs == "*"
            setattr(found, last.dest, rest if several else rest[0])
            rest = [] if several else rest[1:]
        if rest:
            nearest = did_you_mean(options[0].partition("=")[0], self._option_string_actions) if options else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{nearest}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        say_error(f"{message} (see {self.prog} --help)")
        raise SystemExit(2)


def command(
    commands: Commands[Any],
    run: Function,
    example: str,
    *shared: str,
    defaults: dict[str, Any] | None = None,
    **more: Any,
) -> argparse.ArgumentParser:
    """Declare a command: what it does, an example whose first word is its name, and shared arguments.

    The docstring of ``run`` is its help. ``defaults`` are those of the shared arguments where the command has others,
    ``more`` are options of the parser.
    """
    about, opening = (run.__doc__ or "").rstrip("."), f"{run.__doc__}\n\n  pyglow-fast {example}"
    text = about[:1].lower() + about[1:]
    parser: argparse.ArgumentParser = commands.add_parser(example.split()[0], help=text, opening=opening, **more)
    for name in shared:
        parser.add_argument(name, **_SHARED[name])
    parser.set_defaults(run_command=run, **defaults or {})
    return parser


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers of the shared options that are out of their ranges."""
    for key, value in vars(args).items():
        if key in _RANGES and value is not None:
            _RANGES[key].check(key, value, whole=True)
    check_seed(getattr(args, "seed", 0))


def open_run(args: argparse.Namespace, suffix: str = "", *images: str | None) -> tuple[OpenRun, Path]:
    """Check the numbers that were given, open RUN, and find where --out will go, by default into the run's folder.

    ``images`` are read besides the run's own; without a ``suffix`` nothing will be written.
    """
    check_numbers(args)
    if suffix == ".png":
        optional("PIL.ImageDraw", "pictures")  # better missed now than after minutes
    opened = OpenRun.open(args.run, args.last, args.device)
    if not suffix:
        return opened, Path()
    usual = (Path() if opened.folder.path == SHIPPED else Path(args.run)) / f"{args.command}{suffix}"
    return opened, output_path(args.out or str(usual), suffix, "out", opened.source, *images)


def output_path(text: str, suffix: str, argument: str, *images: str | None) -> Path:
    """Find where a file will go, and check it before anything is computed.

    Nothing is written over one of the ``images`` that are read, or among them where they are loose files.
    """
    path = Path(text)
    expect(path.suffix.lower() == suffix, argument, f"a name ending in {suffix}", repr(text))
    check_file(argument, path)
    place = path.resolve()
    folder = RunFolder(place.parent)
    kept = folder.exists and place in folder.kept
    expect(not kept, argument, "another file than those that a run keeps", repr(text))
    for name in filter(None, images):
        expect(Path(name).resolve() != place, argument, "another file than one that is read", repr(text))
        scheme, _, root = name.partition(":")
        among = scheme in LOOSE and bool(root) and Path(root).resolve() in place.parents
        expect(not among, argument, f"a file outside of the folder of {name}", repr(text))
    return path
