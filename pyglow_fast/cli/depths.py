"""Runs ``pyglow-fast depths``: samples and bits/dim of several runs on the same images, shallow beside deep."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.cli._common import folder_name, open_run, picture_path, say, stream, user_input, whole
from pyglow_fast.cli._latents import add_picture, add_temperature, check_options, not_finite_note, save
from pyglow_fast.data import Images
from pyglow_fast.likelihood import count_not_finite
from pyglow_fast.models import Glow
from pyglow_fast.studio.reading import BATCH, selection
from pyglow_fast.train import Checkpoint, RunFolder, class_cycle, evaluate
from pyglow_fast.train.metrics import read_metrics


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command ``depths`` and its options."""
    about = "compare runs of other depths on the same images: samples and bits/dim"
    parser = commands.add_parser("depths", help=about, description=about)
    parser.set_defaults(run_command=run)
    parser.add_argument("runs", type=folder_name, nargs="+", metavar="RUN", help="the folders of two runs or more")
    parser.add_argument(
        "--best", action="store_true", help="the checkpoint with the best held-out bits/dim, not the last"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--n", type=whole, metavar="N", default=16, help="samples of each")
    parser.add_argument("--columns", type=whole, metavar="N", default=8, help="samples in a row")
    add_temperature(parser, 0.7, "multiplies the priors' deviation")
    parser.add_argument(
        "--eval-images",
        type=whole,
        metavar="N",
        default=1000,
        help="at most so many held-out images, where a run holds no score of its checkpoint",
    )
    add_picture(parser, "the samples")


@dataclass(frozen=True)
class _Opened:
    name: str
    folder: RunFolder
    checkpoint: Checkpoint
    model: Glow


def open_runs(args: argparse.Namespace) -> list[_Opened]:
    """Open the runs, which must all be of the same images.

    Raises:
        ValueError: fewer than two, one that is no run, or runs on other images.
    """
    expect(len(args.runs) >= 2, "run", "two runs or more", len(args.runs))
    opened = []
    for name in args.runs:
        one = argparse.Namespace(run=name, best=args.best, device=args.device)
        opened.append(_Opened(name, *open_run(one)))
    first = opened[0].checkpoint
    for item in opened[1:]:
        data, config = item.checkpoint.data, item.checkpoint.config
        same = data.fingerprint == first.data.fingerprint and data.n_bins == first.data.n_bins
        found = f"{config.data.name} {config.model.image_shape}, {data.n_bins} grey levels, in {item.name!r}"
        wanted = f"runs on the images of {opened[0].name!r} ({first.config.data.name} {first.config.model.image_shape}"
        expect(same, "run", f"{wanted}, {first.data.n_bins} grey levels)", found)
    return opened


@dataclass(frozen=True)
class _HeldOut:
    mean: float
    error: float
    source: str


def stored_score(item: _Opened) -> _HeldOut | None:
    """Read the held-out score that the run itself wrote down for the weights of this checkpoint, if it did."""
    step = item.checkpoint.progress["step"]
    try:
        report = item.folder.read_report()
        if report["step"] == step:
            found = report["held_out"]
            source = f"the run's own evaluation, {int(found['images'])} images"
            return _HeldOut(float(found["mean"]), float(found["standard_error"]), source)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not finished yet, or damaged: the metrics may still tell
    for row in reversed(read_metrics(item.folder.metrics)):
        mean, error = row["held_out_bpd"], row["held_out_se"]
        if row["step"] == step and mean is not None:
            return _HeldOut(float(mean), math.nan if error is None else float(error), "the run's own evaluation")
    return None


def _evaluated(item: _Opened, images: Images, limit: int) -> _HeldOut:
    score = evaluate(item.model, images, BATCH, 0, limit)
    return _HeldOut(score.mean, score.standard_error, f"evaluated now, {score.images} images")


def _held_out(item: _Opened) -> Images:
    """The run's held-out images.

    Raises:
        ValueError: they are no longer what they were.
    """
    return selection(item.checkpoint.config.data.name, "held-out", item.checkpoint, item.model).images


def _samples(item: _Opened, args: argparse.Namespace) -> Tensor:
    device = next(item.model.parameters()).device
    y = class_cycle(args.n, item.checkpoint.config.model.n_classes, device)
    return item.model.sample(args.n, args.temperature, y=y, generator=stream(device, args.seed))


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Compare the runs; returns the exit code."""
    with user_input():
        check_options(args, "n", "columns", "eval_images")
        out = picture_path(args.out)
        opened = open_runs(args)
        scores: list[_HeldOut | Images] = [stored_score(item) or _held_out(item) for item in opened]
    rows, n_bins = [], opened[0].checkpoint.data.n_bins
    for item, found in zip(opened, scores, strict=True):
        score = found if isinstance(found, _HeldOut) else _evaluated(item, found, args.eval_images)
        config, step = item.checkpoint.config.model, item.checkpoint.progress["step"]
        shape = f"L = {config.n_levels}, K = {config.n_steps}"
        x = _samples(item, args)
        parameters = sum(parameter.numel() for parameter in item.model.parameters())
        say(
            f"{item.name} at step {step}: {shape}, {parameters:,} parameters, {score.mean:.3f} ± "
            f"{score.error:.3f} bits/dim held out ({score.source}){not_finite_note(count_not_finite(x), 'samples')}"
        )
        label = f"{item.folder.path.resolve().name}\n{shape}\n{score.mean:.3f} bits/dim"
        rows += [(label if i == 0 else "", part) for i, part in enumerate(x.split(args.columns))]
    splits = {(item.checkpoint.config.seed, item.checkpoint.config.data.held_out) for item in opened}
    if len(splits) > 1:
        say("note: the runs differ in --seed or --held-out; where the split is random, so do their held-out images")
    title = f"samples at temperature {args.temperature:g}, seed {args.seed}"
    save(out, rows, n_bins, [], title, args.scale)
    say(f"{args.n} samples of each: {out}")
    return 0
