"""Compares runs that are there: a table, and a page with their curves and samples side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import torch

from pyglow_fast.models import Glow, GlowConfig
from pyglow_fast.studio import Draw, OpenRun
from pyglow_fast.train.figures import class_heads, curve_png, grid, png_bytes, points
from pyglow_fast.train.metrics import read_metrics
from pyglow_fast.train.page import figure, page, plus_minus, row, section, table

_TITLES = ("run", "step", "parameters", "L, K, hidden", "held-out bits/dim", "train", "minutes", "images")
_CURVES = {"held-out bits/dim": "held_out_bpd", "bits/dim of training batches": "train_bpd"}


def parameter_count(config: GlowConfig) -> int:
    """How many parameters a model has in training; a frozen one has its matrices multiplied out."""
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
    """Say whether bits/dim of the runs compare: only of the same images, grey levels and held-out part."""
    parts = ((run.checkpoint.data.fingerprint, run.checkpoint.config) for run in runs)
    if len({(fingerprint, config.seed, config.data.held_out) for fingerprint, config in parts}) == 1:
        return "the images are the same"
    each = [f"{run.name} {run.source}, {run.model.config.image_shape}, n_bins {run.n_bins}" for run in runs]
    return f"bits/dim compare only if the images, their grey levels and those held out are the same: {'; '.join(each)}"


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
