"""Summarises the runs of a comparison: curves with their spread over the seeds, a table, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pyglow_fast._moments import Moments
from pyglow_fast.data import optional
from pyglow_fast.layers.flow_step import PERMUTATIONS
from pyglow_fast.models import Glow
from pyglow_fast.train import RunFolder, TrainConfig
from pyglow_fast.train.csv_text import Cell, csv_text
from pyglow_fast.train.files import refusing, replacing, write_text
from pyglow_fast.train.metrics import Row, read_metrics

CURVES, TABLE, PICTURE = "curves.csv", "table.md", "curves.png"
EARLY = 0.1  # the first share of the steps, which the axis of the picture need not show


@dataclass(frozen=True)
class Outcome:
    """What one run of a comparison came to: its settings, its curve and its final score.

    Args:
        config: the settings of the run.
        step: steps done.
        held_out: bits/dim of all held-out images at its end; None for a run that did not come to it.
        curve: (step, held-out bits/dim) of its evaluations; NaN and inf are kept.
        seconds_per_step: median over metrics.csv; NaN without any.
        parameters: how many the model has.
        note: what is wrong, if anything.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.experiments import Outcome
        >>> from pyglow_fast.train import TrainConfig
        >>> config = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1, permutation="reverse", n_checkerboard=2))
        >>> curve = ((500, 3.41), (1000, 3.28))
        >>> outcome = Outcome(config, step=1000, held_out=3.27, curve=curve, seconds_per_step=0.1, parameters=70_000)
        >>> outcome.variant, outcome.curve[-1]
        (('reverse + 2 checkerboards', 'affine'), (1000, 3.28))
    """

    config: TrainConfig
    step: int
    held_out: float | None
    curve: tuple[tuple[int, float], ...]
    seconds_per_step: float
    parameters: int
    note: str = ""

    @classmethod
    def of(cls, config: TrainConfig, folder: RunFolder, held_out: float | None, step: int, note: str) -> Outcome:
        """Complete a run's outcome from the files in its folder."""
        rows = [row for row in read_metrics(folder.metrics) if int(row["step"] or 0) <= step]
        curve = [(int(row["step"] or 0), float(value)) for row in rows if (value := row["held_out_bpd"]) is not None]
        count = sum(parameter.numel() for parameter in Glow(config.model).parameters())
        return cls(config, step, held_out, tuple(curve), seconds_per_step(rows, config.batch_size), count, note)

    @property
    def variant(self) -> tuple[str, str]:
        """The pair (permutation, coupling); a number of checkerboards, if any, stands in the permutation's name."""
        model = self.config.model
        boards = f" + {model.n_checkerboard} checkerboard{'s' if model.n_checkerboard > 1 else ''}"
        return model.permutation + (boards if model.n_checkerboard else ""), model.coupling


def seconds_per_step(rows: Sequence[Row], batch_size: int) -> float:
    """Compute the median of batch_size / images_per_s, without rows whose time contains an evaluation if it can."""
    known = [row for row in rows if row["images_per_s"]]
    plain = [row for row in known if row["held_out_bpd"] is None]
    return statistics.median([batch_size / (row["images_per_s"] or math.nan) for row in plain or known] or [math.nan])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Compute m = sum v / n and sqrt(sum (v - m)^2 / (n - 1)); the latter is NaN for one value, both are for none."""
    found = Moments.of(torch.tensor(values, dtype=torch.float64))
    return found.mean, found.deviation


@dataclass(frozen=True)
class Point:
    """Held-out bits/dim of a variant at one step: mean and standard deviation over ``seeds`` runs."""

    step: int
    mean: float
    spread: float
    seeds: int


Curves = dict[tuple[str, str], list[Point]]


def by_variant(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], list[Outcome]]:
    """Group runs by (permutation, coupling), in the order in which these first come."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.variant, []).append(outcome)
    return found


def curves_of(outcomes: Sequence[Outcome]) -> Curves:
    """Average the curve of each variant, at each step over those seeds that were evaluated there."""
    curves: Curves = {}
    for variant, runs in by_variant(outcomes).items():
        values: dict[int, list[float]] = {}
        for run in runs:
            for step, value in run.curve:
                values.setdefault(step, []).append(value)
        curves[variant] = [Point(step, *mean_and_spread(values[step]), len(values[step])) for step in sorted(values)]
    return curves


def curves_csv(curves: Curves) -> str:
    """Write CSV text: permutation, coupling, step, held_out_bpd, its deviation over seeds (empty for one), seeds."""
    rows: list[list[Cell]] = [["permutation", "coupling", "step", "held_out_bpd", "held_out_bpd_sd", "seeds"]]
    for variant, points in curves.items():
        for point in points:
            spread = None if point.seeds < 2 else point.spread
            rows.append([*variant, point.step, point.mean, spread, point.seeds])
    return csv_text(rows)


def table_md(outcomes: Sequence[Outcome], images: str) -> str:
    """Make a Markdown table with one row for each variant, the best first, which can be read as it stands."""
    titles = ("permutation", "coupling", "held-out bits/dim", "seeds", "steps", "parameters", "ms/step")
    keyed = []
    for variant, runs in by_variant(outcomes).items():
        mean, spread = mean_and_spread([run.held_out for run in runs if run.held_out is not None])
        ended = sum(run.held_out is not None for run in runs)
        score = "none" if ended == 0 else f"{mean:.4f}" + ("" if ended < 2 else f" ± {spread:.4f}")
        speed = statistics.fmean([run.seconds_per_step for run in runs if not math.isnan(run.seconds_per_step)] or [0])
        steps = sorted({run.step for run in runs if run.held_out is not None} or {run.step for run in runs})
        count = str(len(runs)) if ended == len(runs) else f"{ended} of {len(runs)}"
        extent = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        cells = (*variant, score, count, extent, f"{runs[0].parameters:,}", f"{1000 * speed:.1f}" if speed else "n/a")
        keyed.append((math.inf if math.isnan(mean) else mean, cells))
    rows = [titles, *(cells for _, cells in sorted(keyed, key=lambda item: item[0]))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    model, config = outcomes[0].config.model, outcomes[0].config
    size = f"L={model.n_levels}, K={model.n_steps}, hidden width {model.hidden}, batches of {config.batch_size}"
    wrong = [
        f"- {run.variant[0]}, {run.variant[1]}, seed {run.config.seed}: {run.note}" for run in outcomes if run.note
    ]
    return "\n".join(
        [
            f"{images}: {size}, {config.optimizer} with lr {config.lr:g}.",
            "",
            *lines,
            "",
            "± is the standard deviation over the seeds. Runs of one seed have the same split and batches.",
            *(["", *wrong] if wrong else []),
            "",
        ]
    )


def save_curves(curves: Curves, path: Path, images: str) -> None:
    """Draw a panel for each coupling, a line for each permutation: mean over the seeds, and one standard deviation.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure_class = optional("matplotlib.figure", "the curves").Figure  # no pyplot: no global state
    couplings = list(dict.fromkeys(coupling for _, coupling in curves))
    colours = list(dict.fromkeys([*PERMUTATIONS, *(name for name, _ in curves)]))
    figure = figure_class(figsize=(1.5 + 4.5 * len(couplings), 4.5), layout="constrained")
    panels = figure.subplots(1, len(couplings), sharey=True, squeeze=False)[0]
    for axes, coupling in zip(panels, couplings, strict=True):
        for (permutation, other), points in curves.items():
            if other != coupling:
                continue
            steps, means = [point.step for point in points], [point.mean for point in points]
            seeds = max((point.seeds for point in points), default=0)
            label = f"{permutation}, {seeds} seed{'s' if seeds != 1 else ''}"
            colour = f"C{colours.index(permutation)}"
            axes.plot(steps, means, color=colour, marker="o", ms=3, lw=1.4, label=label)
            spread = [0.0 if math.isnan(point.spread) else point.spread for point in points]
            ends = [[mean + sign * sd for mean, sd in zip(means, spread, strict=True)] for sign in (-1, 1)]
            axes.fill_between(steps, *ends, color=colour, alpha=0.2, lw=0)
        axes.set(title=f"{coupling} coupling", xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("held-out bits/dim")
    if limits := _limits(curves):
        panels[0].set_ylim(*limits)
    figure.suptitle(f"{images}: mean over the seeds, and one standard deviation", parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _limits(curves: Mapping[tuple[str, str], Sequence[Point]]) -> tuple[float, float] | None:
    """Find the axis from just below the lowest to just above the highest point, but for the first, higher steps."""
    last = max((point.step for points in curves.values() for point in points), default=0)
    shown = [
        (point.mean, 0.0 if math.isnan(point.spread) else point.spread)
        for points in curves.values()
        for point in points
        if point.step >= EARLY * last and math.isfinite(point.mean)
    ]
    if not shown:
        return None
    low, high = min(mean - sd for mean, sd in shown), max(mean + sd for mean, sd in shown)
    margin = 0.05 * (high - low) + 0.01
    return low - margin, high + margin


def write_outcomes(outcomes: Sequence[Outcome], out: Path, images: str) -> str:
    """Replace curves.csv, table.md and curves.png in ``out``; returns the table.

    Raises:
        FolderError: the folder cannot be written.
    """
    curves, table = curves_of(outcomes), table_md(outcomes, images)
    with refusing():
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / CURVES, curves_csv(curves))
        write_text(out / TABLE, table)
        save_curves(curves, out / PICTURE, images)
    return table
