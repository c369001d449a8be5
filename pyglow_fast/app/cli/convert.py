"""Runs ``pyglow-fast convert``: checkpoints of other Glow implementations to this package's models, and back."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyglow_fast._core.errors import expect
from pyglow_fast.app.cli._arguments import Commands, command
from pyglow_fast.app.cli._output import say, user_input
from pyglow_fast.app.studio.opened import find_run
from pyglow_fast.interop import convert
from pyglow_fast.interop.convert.files import check_target
from pyglow_fast.models import Glow
from pyglow_fast.train import load_model

OWN = "pyglow"
# How each is read and written.
FORMATS: dict[str, tuple[Callable[..., Glow], Callable[..., Any]]] = {
    "openai": (convert.load_openai, convert.save_openai),
    "rosinality": (convert.load_rosinality, convert.save_rosinality),
    "chaiyujin": (convert.load_chaiyujin, convert.save_chaiyujin),
    "y0ast": (convert.load_y0ast, convert.save_y0ast),
}
OPTIONS = ("image_size", "permutation", "averaged", "lu", "learn_top", "batch_size", "rescale")


def add(commands: Commands[Any]) -> None:
    """Declare the command ``convert`` and its options; one that is not given does not appear in the namespace."""
    example = "convert rosinality model.pt glow.safetensors --image-size 64"
    parser = command(commands, run, example, argument_default=argparse.SUPPRESS)
    names = [*FORMATS, OWN]
    parser.add_argument("format", choices=names, metavar="FORMAT", help=f"of IN: {', '.join(names)}")
    parser.add_argument("source", metavar="IN", help=f"file to read; of {OWN}: a file, or the folder of a run")
    text = "file to write: .safetensors, .npz, or torch.save's .pt and the like"
    parser.add_argument("out", metavar="OUT", help=text)
    parser.add_argument("--to", choices=names, default=OWN, metavar="FORMAT", help="of OUT")
    text = "of the images: openai and rosinality need it"
    parser.add_argument("--image-size", type=int, metavar="N", help=text)
    text = "chaiyujin, y0ast: a model without 1x1 convolutions"
    parser.add_argument("--permutation", choices=["reverse"], metavar="reverse", help=text)
    parser.add_argument("--averaged", action="store_true", default=argparse.SUPPRESS, help="openai: moving averages")
    text = f"{OWN}, a run: the newest checkpoint, not the best"
    parser.add_argument("--last", action="store_true", default=False, help=text)
    flag: dict[str, Any] = {"default": argparse.SUPPRESS}
    parser.add_argument("--lu", action="store_true", help="openai: 1x1 convolutions as LU factors", **flag)
    text = "without a learned top prior"
    parser.add_argument("--no-learn-top", dest="learn_top", action="store_false", help=text, **flag)
    parser.add_argument("--batch-size", type=int, metavar="N", help="chaiyujin: of prior_h (by itself 1)")
    text = "chaiyujin: x stays in [0, 1], not in [-0.5, 0.5)"
    parser.add_argument("--no-rescale", dest="rescale", action="store_false", help=text, **flag)


def run(args: argparse.Namespace) -> None:
    """Convert checkpoints of other Glow implementations to this package's models, and back."""
    with user_input():
        out, read = check_target(args.out), Path(args.source).resolve()
        itself = out.exists() and read in (out.resolve(), *out.resolve().parents)
        expect(not itself, "out", "another file than is read, and none of the run", repr(args.out))
        given = {name: value for name, value in vars(args).items() if name in OPTIONS}
        load = None if args.format == OWN else FORMATS[args.format][0]
        save = None if args.to == OWN else FORMATS[args.to][1]
        parameters: Any = [() if side is None else inspect.signature(side).parameters for side in (load, save)]
        reading, writing = ({name: given[name] for name in side if name in given} for side in parameters)
        for name, value in given.items():  # options that neither side would look at
            expect(name in reading | writing, name, f"no such option for {args.format} to {args.to}", value)
        expect(not args.last or load is None, "last", "no such option but for a run", args.last)
        expect(args.to != OWN or out.suffix == ".safetensors", "out", "a name ending in .safetensors", repr(args.out))
        if load is None:
            model = _own_model(args.source, args.last)
        else:
            sized = "image_size" not in parameters[0] or "image_size" in reading
            expect(sized, "image_size", "--image-size N", "none")
            model = load(args.source, **reading)
        if save is None:
            convert.save_glow(model, out)
        else:
            content = save(model, **writing)
            if args.to == "chaiyujin" and out.suffix not in (".safetensors", ".npz"):
                content = {"global_step": 0, "graph": dict(content)}  # what their loader opens
            convert.write_tensors(out, content)
    config = model.config
    about = f"L {config.n_levels}, K {config.n_steps}, hidden {config.hidden}, {config.coupling}, {config.permutation}"
    say(f"{args.format} -> {args.to}: {'x'.join(map(str, config.image_shape))}, {about}: {out}")


def _own_model(source: str, last: bool) -> Glow:
    if not Path(source).is_dir():
        expect(not last, "last", "a run", f"a file, {source!r}")
        return convert.load_glow(source)
    folder, best = find_run(source, last)
    return load_model(folder.load(best), str(folder.path))
