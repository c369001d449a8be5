"""``pyglow-fast train``: a new run, or the rest of one."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import folder_name, number, table, user_input, whole
from pyglow_fast.data import DATA_HELP, DataConfig, ImageSet, load_data
from pyglow_fast.models import GlowConfig
from pyglow_fast.train import OPTIMIZERS, Result, Run, RunFolder, TrainConfig, resume, start

# What suits a source better than the general defaults; anything given on the command line comes before.
PRESETS: dict[str, dict[str, Any]] = {
    # 1,617 training digits: the paper's model would learn them by heart within minutes. Narrow nets, weight decay and
    # a large but falling learning rate did best on held-out digits of all that was tried.
    "digits": {
        "n_levels": 2,
        "n_steps": 12,
        "hidden": 24,
        "lr": 1e-2,
        "weight_decay": 0.3,
        "max_steps": 1500,
        "decay_steps": 1500,
        # At 8x8 a second thread gains nothing, and waiting for it costs tenfold when another process has its core.
        "threads": 1,
    },
}
_DATA = tuple(item.name for item in fields(DataConfig) if item.name != "name")
_MODEL = ("n_levels", "n_steps", "hidden", "coupling", "permutation", "net_actnorm", "scale_map")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    about = "train a Glow on images"
    parser = commands.add_parser("train", help=about, description=about, argument_default=argparse.SUPPRESS)
    parser.set_defaults(run_command=run)
    parser.add_argument("data", metavar="DATA", help=DATA_HELP)
    parser.add_argument("--out", type=folder_name, required=True, metavar="DIR", help="the folder of the run")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", default=False, help="go on from the last checkpoint in --out"
    )
    existing.add_argument("--overwrite", action="store_true", default=False, help="replace a run that is in --out")
    parser.add_argument("--quiet", action="store_true", default=False, help="print the final figures only")

    group = parser.add_argument_group("images (folders only, but for --held-out)")
    group.add_argument(
        "--size", type=whole, metavar="N", help="side of the square that images are cropped and scaled to (32)"
    )
    colour = group.add_mutually_exclusive_group()
    colour.add_argument("--gray", dest="gray", action="store_true", help="one channel")
    colour.add_argument("--color", dest="gray", action="store_false", help="three channels (the default)")
    group.add_argument("--n-bits", type=whole, metavar="N", help="bits kept of each sample, 1..8 (8)")
    group.add_argument("--split-by", metavar="NAME", help="what the split keeps together: file (default) or folder")
    group.add_argument("--held-out", type=number, metavar="X", help="fraction of the images held out (0.1)")

    group = parser.add_argument_group("model")
    group.add_argument("--levels", dest="n_levels", type=whole, metavar="N", help="L (3; digits 2)")
    group.add_argument("--steps", dest="n_steps", type=whole, metavar="N", help="K, flow steps a level (32; digits 12)")
    group.add_argument("--hidden", type=whole, metavar="N", help="width of the coupling nets (512; digits 24)")
    group.add_argument("--coupling", metavar="NAME", help="affine (default) or additive")
    group.add_argument("--permutation", metavar="NAME", help="invconv (default), invconv_plain, shuffle or reverse")
    group.add_argument("--net-actnorm", action="store_true", help="actnorm inside the coupling nets")
    group.add_argument("--scale-map", metavar="NAME", help="sigmoid (default), exp, tanh or atan")
    group.add_argument("--class-conditional", action="store_true", help="condition the top prior on the labels")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--optimizer", metavar="NAME", help=f"{' or '.join(OPTIMIZERS)} (adam)")
    group.add_argument("--lr", type=number, metavar="X", help="learning rate after warm-up (0.001; digits 0.01)")
    group.add_argument("--warmup", dest="warmup_steps", type=whole, metavar="N", help="steps of linear warm-up (100)")
    group.add_argument(
        "--decay-steps",
        type=whole,
        metavar="N",
        help="cosine decay of the learning rate up to this step (none; digits 1500)",
    )
    group.add_argument(
        "--weight-decay", type=number, metavar="X", help="decoupled weight decay, adam only (0; digits 0.3)"
    )
    clip = group.add_mutually_exclusive_group()
    clip.add_argument("--clip", dest="clip_norm", type=number, metavar="X", help="gradient norm to clip to (1)")
    clip.add_argument("--no-clip", dest="clip_norm", action="store_const", const=None, help="no clipping")
    group.add_argument("--batch-size", type=whole, metavar="N", help="images a step (64)")
    group.add_argument("--max-steps", type=whole, metavar="N", help="stop after so many steps (10000; digits 1500) ...")
    group.add_argument("--max-epochs", type=whole, metavar="N", help="... or passes over the training images ...")
    group.add_argument(
        "--max-minutes", type=number, metavar="X", help="... or minutes; given one of these, the others do not count"
    )
    group.add_argument("--seed", type=whole, metavar="N", help="of everything random (0)")
    group.add_argument("--threads", type=whole, metavar="N", help="CPU threads (as torch chooses; digits 1)")
    group.add_argument("--device", help="cpu, cuda, cuda:N or auto (default)")

    group = parser.add_argument_group("output, in steps")
    for what, default in (("log", 20), ("eval", 500), ("save", 500), ("sample", 500)):
        group.add_argument(f"--{what}-every", type=whole, metavar="N", help=f"({default})")
    group.add_argument(
        "--eval-images",
        type=whole,
        metavar="N",
        help="at most so many images an evaluation, drawn once (1000; all at the end)",
    )
    group.add_argument("--sample-count", type=whole, metavar="N", help="images in samples.png (64)")
    group.add_argument(
        "--temperature", dest="sample_temperature", type=number, metavar="X", help="of samples.png (0.7)"
    )


def make_config(given: dict[str, Any], name: str) -> tuple[TrainConfig, ImageSet]:
    """The configuration for what was given, with the preset of the source, and the images that decide its shape.

    Raises:
        ValueError: see DataConfig, GlowConfig and TrainConfig.
    """
    data_config = DataConfig(name, **{key: given[key] for key in _DATA if key in given})
    data = load_data(data_config)
    preset = dict(PRESETS.get(name.partition(":")[0], {}))
    if any(f"max_{unit}" in given for unit in ("steps", "epochs", "minutes")):
        preset["max_steps"] = None  # a limit that was asked for is not cut short by one that was not
        if "decay_steps" in preset:
            preset["decay_steps"] = given.get("max_steps")
    if given.get("optimizer") == "adamax":
        preset.pop("weight_decay", None)  # it has none
    values = preset | given
    conditional = values.get("class_conditional", False)
    expect(
        not conditional or data.labels is not None, "class_conditional", "images with labels", f"none in {data.name}"
    )
    model = GlowConfig(
        image_shape=data.image_shape,
        n_classes=len(data.class_names) if conditional else None,
        **{key: values[key] for key in _MODEL if key in values},
    )
    rest = {key: value for key, value in values.items() if key not in (*_DATA, *_MODEL)}
    return TrainConfig(data=data_config, model=model, **rest), data


def resumed(given: dict[str, Any], name: str, out: str) -> Run:
    """The run to go on with, after checking that whatever was given is as it was or may change.

    Raises:
        ValueError: see :func:`pyglow_fast.train.resume`.
    """
    stored = RunFolder(out).load().config
    for part, known in ((stored.data, _DATA), (stored.model, _MODEL)):
        for key in known:
            if key in given:
                was = getattr(part, key)
                expect(given[key] == was, key, f"{was!r}, as the run was started with", repr(given[key]))
    changes = {key: value for key, value in given.items() if key not in (*_DATA, *_MODEL)}
    return resume(out, name, **changes)


def summary(result: Result) -> str:
    """The final figures, for people."""
    if result.held_out is None or result.train is None:
        return ""
    scores = {"held-out": result.held_out, "train": result.train}
    if result.before is not None:
        scores = {"held-out, untrained": result.before, **scores}
    return table(scores, result.yardsticks)


def finish(result: Result, folder: RunFolder) -> int:
    """Report how a run ended; returns the exit code, by shell convention 128 + N after signal N."""
    if result.stopped_by is not None:
        print(f"the run in {folder.path} stopped at step {result.step}; go on with --resume")
        return 128 + result.stopped_by
    print(f"{result.step} steps in {result.seconds:.0f} s\n{summary(result)}\n{folder.samples}\n{folder.curve}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    special = ("run_command", "data", "out", "resume", "overwrite", "quiet", "command")
    given = {key: value for key, value in vars(args).items() if key not in special}
    with user_input():
        if args.resume:
            ready = resumed(given, args.data, args.out)
        else:
            config, data = make_config(given, args.data)
            ready = start(config, args.out, args.overwrite, data)
    return finish(ready.execute(args.quiet), ready.folder)
