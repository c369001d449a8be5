"""Compares runs that are there: a table, and a page with their curves and samples side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import fields

import torch

from pyglow_fast.app.studio import Draw, OpenRun
from pyglow_fast.data import DataConfig
from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.train.figures import class_heads, curve_png, grid, png_bytes, points
from pyglow_fast.train.metrics import read_metrics
from pyglow_fast.train.page import figure, page, plus_minus, row, section, table

SAME = "the images are the same"
_TITLES = ("run", "step", "parameters", "L, K, hidden", "held-out bits/dim", "train", "minutes", "images")
_CURVES = {"held-out bits/dim": "held_out_bpd", "bits/dim of training batches": "train_bpd"}


def parameter_count(config: GlowConfig) -> int:
    """Count the parameters that a model has in training; a frozen one has its matrices multiplied out."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Glow(config).parameters())


def run_table(runs: Sequence[OpenRun]) -> list[Sequence[str]]:
    """Say below titles what each run's checkpoint is, and how it, or the last one before it, was scored in training."""
    rows: list[Sequence[str]] = [_TITLES]
    for run in runs:
        model, size = run.model.config, parameter_count(run.model.config)
        metrics = [line for line in read_metrics(run.folder.metrics) if int(line["step"] or 0) <= run.step]
        scored = next((line for line in reversed(metrics) if line["held_out_bpd"] is not None), {})
        found = [plus_minus(scored.get(f"{of}_bpd"), scored.get(f"{of}_se")) for of in ("held_out", "train_subset")]
        found[0] += "" if scored.get("step") in (None, run.step) else f" at step {scored['step']}"
        shape, minutes = f"{model.n_levels}, {model.n_steps}, {model.hidden}", run.checkpoint.progress["seconds"] / 60
        rows.append((run.name, str(run.step), f"{size:,}", shape, *found, f"{minutes:.1f}", run.source))
    return rows


def caveat(runs: Sequence[OpenRun]) -> str:
    """Say in what the images of the runs differ, apart from flips in training: bits/dim of others do not compare."""
    differ = []
    for name in (item.name for item in fields(DataConfig) if item.name != "flip"):
        values = [str(getattr(run.checkpoint.config.data, name)) for run in runs]
        differ += [f"{name} ({', '.join(values)})"] if len(set(values)) > 1 else []
    seeds = [str(run.checkpoint.config.seed) for run in runs]
    differ += [f"seed ({', '.join(seeds)})"] if len(set(seeds)) > 1 else []
    flips = {run.checkpoint.config.data.flip for run in runs}
    if not differ and len(flips) == 1 and len({run.checkpoint.data.fingerprint for run in runs}) > 1:
        differ = ["the files themselves"]
    return f"the images, or those held out, may not be the same: {'; '.join(differ)}" if differ else SAME


def comparison_page(runs: Sequence[OpenRun], draw: Draw) -> str:
    """Make an HTML page of the table, the curves, and the same ``draw`` of each run."""
    metrics = {run.name: read_metrics(run.folder.metrics) for run in runs}
    lines = {title: {name: points(metrics[name], column) for name in metrics} for title, column in _CURVES.items()}
    curves = [figure(title, curve_png(found, "bits/dim")) for title, found in lines.items()]
    # Classes have columns of their own where all runs have the same: else images would not be of one size.
    heads = class_heads(draw.n, runs[0].classes) if len({run.classes for run in runs}) == 1 else []
    samples = []
    for run in runs:
        pixels, _, bad = run.drawn(draw)
        text = f"{run.name}, step {run.step}" + (f", {len(bad)} not finite, shown grey" if bad else "")
        samples.append(figure(text, png_bytes(grid(pixels, run.n_bins, heads or math.ceil(math.sqrt(draw.n))))))
    parts = [table(run_table(runs)), f"<p>{html.escape(caveat(runs))}</p>", *section("Curves", row(curves))]
    parts += section(f"Samples, temperature {draw.temperature:g}, seed {draw.seed}", row(samples, "same"))
    return page(" beside ".join(metrics), parts)
