"""Runs ``pyglow-fast convert``: checkpoints of other Glow implementations to this package's models, and back."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import say, user_input, whole
from pyglow_fast.interop import convert
from pyglow_fast.interop.convert.files import check_target
from pyglow_fast.models import Glow
from pyglow_fast.train import RunFolder, load_model

OWN = "pyglow"


class _Format(NamedTuple):
    load: Callable[..., Glow]
    save: Callable[..., Mapping[str, Any]]


FORMATS = {
    "openai": _Format(convert.load_openai, convert.save_openai),
    "rosinality": _Format(convert.load_rosinality, convert.save_rosinality),
    "chaiyujin": _Format(convert.load_chaiyujin, convert.save_chaiyujin),
    "y0ast": _Format(convert.load_y0ast, convert.save_y0ast),
}


def sides(text: str) -> int | tuple[int, int]:
    """Read N or HxW, the sides of images, as an argument type of argparse."""
    parts = text.lower().split("x")
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected N or HxW, found {text!r}")
    numbers = [whole(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``convert`` and its options."""
    about = "checkpoints of other Glow implementations to this package's models, and back"
    parser = commands.add_parser("convert", help=about, description=about + "; see docs/convert.md")
    parser.set_defaults(run_command=run)
    names = [*FORMATS, OWN]
    parser.add_argument("format", choices=names, metavar="FORMAT", help=f"of IN: {', '.join(names)}")
    parser.add_argument("source", metavar="IN", help=f"file to read; of {OWN}: a file, or the folder of a run")
    parser.add_argument(
        "out", metavar="OUT", help="file to write: .safetensors, .npz, or torch.save's .pt and the like"
    )
    parser.add_argument("--to", choices=names, default=OWN, metavar="FORMAT", help="of OUT")
    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--image-size", type=sides, metavar="N or HxW", help="of the images: openai and rosinality need it"
    )
    reading.add_argument(
        "--permutation",
        choices=["reverse"],
        metavar="reverse",
        help="chaiyujin, y0ast: a model without 1x1 convolutions",
    )
    reading.add_argument("--averaged", action="store_true", help="openai: the moving averages of the weights")
    reading.add_argument("--best", action="store_true", help=f"{OWN}, a run: the best checkpoint, not the last")
    writing = parser.add_argument_group("writing")
    writing.add_argument("--lu", action="store_true", help="openai: 1x1 convolutions as LU factors")
    writing.add_argument("--no-learn-top", dest="learn_top", action="store_false", help="without a learned top prior")
    writing.add_argument("--batch-size", type=whole, metavar="N", help="chaiyujin: of prior_h (default: 1)")
    both = parser.add_argument_group("both")
    both.add_argument(
        "--no-rescale", dest="rescale", action="store_false", help="chaiyujin: x stays in [0, 1], not in [-0.5, 0.5)"
    )


def _own_model(source: str, best: bool) -> Glow:
    if not Path(source).is_dir():
        expect(not best, "best", "a run", f"a file, {source!r}")
        return convert.load_glow(source)
    folder = RunFolder(source)
    return load_model(folder.load(best), str(folder.path))


def _options(args: argparse.Namespace, function: Callable[..., object]) -> dict[str, Any]:
    """What was given on the command line and the function takes."""
    wanted = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in wanted and value is not None}


def run(args: argparse.Namespace) -> int:
    """Convert the file; returns the exit code."""
    with user_input():
        out = check_target(args.out)
        read = Path(args.source).resolve()
        itself = out.exists() and read in (out.resolve(), *out.resolve().parents)
        expect(not itself, "out", "another file than is read, and none of the run", repr(args.out))
        _check_options(args)
        if args.to == OWN:
            expect(out.suffix == ".safetensors", "out", "a name ending in .safetensors", repr(args.out))
        if args.format == OWN:
            model = _own_model(args.source, args.best)
        else:
            load = FORMATS[args.format].load
            needs_size = "image_size" in inspect.signature(load).parameters
            expect(not needs_size or args.image_size is not None, "image_size", "--image-size N", "none")
            model = load(args.source, **_options(args, load))
        if args.to == OWN:
            convert.save_glow(model, out)
        else:
            save = FORMATS[args.to].save
            content: Mapping[str, Any] = save(model, **_options(args, save))
            if args.to == "chaiyujin" and out.suffix not in (".safetensors", ".npz"):
                content = {"global_step": 0, "graph": dict(content)}  # what their loader opens
            convert.write_tensors(out, content)
    config = model.config
    about = f"L {config.n_levels}, K {config.n_steps}, hidden {config.hidden}, {config.coupling}, {config.permutation}"
    say(f"{args.format} -> {args.to}: {'x'.join(map(str, config.image_shape))}, {about}: {out}")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that neither side would look at.

    Raises:
        ValueError: there is one.
    """
    functions = [FORMATS[name][part] for part, name in enumerate((args.format, args.to)) if name != OWN]
    known = {name for function in functions for name in inspect.signature(function).parameters}
    given = {
        "image_size": args.image_size is not None,
        "permutation": args.permutation is not None,
        "averaged": args.averaged,
        "lu": args.lu,
        "learn_top": not args.learn_top,
        "batch_size": args.batch_size is not None,
        "rescale": not args.rescale,
    }
    for name, is_given in given.items():
        expected = f"no such option for {args.format} to {args.to}"
        expect(not is_given or name in known, name, expected, getattr(args, name))
    expect(not args.best or args.format == OWN, "best", "no such option but for a run", args.best)
