"""Runs ``pyglow-fast compare``: the paper's ablation, permutations x couplings, maybe x masks, over several seeds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import folder_name, say, user_input, whole
from pyglow_fast.cli._train_options import add_options
from pyglow_fast.cli.train import gathered, make_config
from pyglow_fast.data import DATA_HELP
from pyglow_fast.experiments import Comparison, variants
from pyglow_fast.train.config import images_for

PERMUTATIONS = ("reverse", "shuffle", "invconv")
COUPLINGS = ("additive", "affine")
_SPECIAL = ("run_command", "data", "out", "quiet", "command", "config", "preset")
_VARIED = ("permutations", "couplings", "seeds", "checkerboards")
_PLURAL = {"permutation": "permutations", "coupling": "couplings", "seed": "seeds", "checkerboard": "checkerboards"}


def _refused(plural: str) -> Callable[[str], str]:
    """A type for argparse that no text has."""

    def refuse(text: str) -> str:
        raise argparse.ArgumentTypeError(f"expected --{plural} in its place, which takes several, found {text!r}")

    return refuse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``compare`` and its options."""
    about = "train permutations x couplings over several seeds, and compare their held-out bits/dim"
    parser = commands.add_parser(
        "compare", help=about, description=about, argument_default=argparse.SUPPRESS, conflict_handler="resolve"
    )
    parser.set_defaults(run_command=run)
    parser.add_argument("data", metavar="DATA", nargs="?", default=None, help=DATA_HELP)
    parser.add_argument(
        "--out",
        required=True,
        type=folder_name,
        metavar="DIR",
        help="a folder; runs that are finished in it are not trained again, others go on",
    )
    parser.add_argument(
        "--permutations",
        nargs="+",
        default=list(PERMUTATIONS),
        metavar="NAME",
        help="what the models mix channels by; invconv_plain too",
    )
    parser.add_argument(
        "--couplings", nargs="+", default=list(COUPLINGS), metavar="NAME", help="affine, additive or both"
    )
    parser.add_argument(
        "--checkerboards",
        nargs="+",
        type=whole,
        default=None,
        metavar="N",
        help="how many of the K steps have checkerboard masks (default: as in the settings)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=whole, default=[0, 1, 2], metavar="N", help="each model is trained once with each"
    )
    parser.add_argument(
        "--config", default=None, metavar="FILE", help="settings from a file, as for train; options come before them"
    )
    parser.add_argument("--preset", default=None, metavar="NAME", help="settings under a name, as for train")
    parser.add_argument("--quiet", action="store_true", default=False, help="print the table only")
    add_options(parser)
    for name, plural in _PLURAL.items():  # replaces train's option of that name
        parser.add_argument(f"--{name}", type=_refused(plural), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train all variants and compare them; returns the exit code."""
    with user_input():
        world = os.environ.get("WORLD_SIZE", "1")
        expect(world == "1", "WORLD_SIZE", "1, since the runs follow one another in one process", repr(world))
        given = gathered(args, (*_SPECIAL, *_VARIED))
        name = given.data if given.preset is None else images_for(given.preset, given.data)
        expect(name is not None, "data", DATA_HELP, "none")
        assert name is not None  # for the type checker: refused above
        first = {"permutation": args.permutations[0], "coupling": args.couplings[0], "seed": args.seeds[0]}
        if args.checkerboards:
            first["n_checkerboard"] = args.checkerboards[0]
        base, data = make_config(given.settings | first, name, given.preset)
        configs = variants(base, args.permutations, args.couplings, args.seeds, args.checkerboards)
        comparison = Comparison(configs, args.out, data)
    for note in () if args.quiet else given.notes:
        say(note)
    signum = comparison.execute(args.quiet)
    say(f"\n{comparison.write()}", lines=True)
    if signum is not None:
        say(f"stopped; the same command goes on in {args.out}")
        return 128 + signum
    for path in comparison.files:
        say(path)
    return 1 if comparison.failures else 0
