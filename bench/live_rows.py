"""Rows of the benchmark of live models, the table made of them, and the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.precisions import masks_error

THEIRS, ACCELERATED = "theirs", "accelerated"
VARIANTS = (THEIRS, ACCELERATED, "store", "reversible")
EXACT = 1e-9  # relative, of outputs and gradients in float64
FACTOR = 2.0  # of the error of theirs, in the precision that is measured
# Float32 gradients may be off by so much, however little theirs are off: a relu's argument that is off by rounding may
# have another sign.
OTHER_SIGNS = masks_error(2.0**-23)


@dataclasses.dataclass(frozen=True)
class LiveRow:
    """One variant of one model. What was not measured, since nothing was replaced or it failed, is None.

    ``errors``: "outputs" (latents and log-determinants) and "gradients", each the relative error of all together
    against theirs in float64, computed in the row's precision; with "float64 " in front, computed in float64.
    ``activation_bytes``: what a training step has alive at its peak besides parameters and their gradients. ``joined``:
    steps that run in chains. ``left``: why layers and nets are as they were, with how many are for that reason.
    """

    model: str
    source: str
    batch: int
    variant: str
    precision: str
    device: str
    malloc: str
    replaced: int = 0
    joined: int = 0
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    train_seconds: float | None = None
    train_quartiles: tuple[float, float] | None = None
    train_ratio: float | None = None
    infer_seconds: float | None = None
    infer_quartiles: tuple[float, float] | None = None
    infer_ratio: float | None = None
    rounds: int = 0
    activation_bytes: int | None = None
    memory_ratio: float | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    note: str = ""
    wrong: bool = False

    @classmethod
    def of(cls, values: dict[str, Any]) -> LiveRow:
        """Read a row from JSON."""
        pairs = {name: tuple(values[name]) for name in ("train_quartiles", "infer_quartiles") if values[name]}
        return cls(**values | pairs)


def faults(row: LiveRow, theirs: LiveRow) -> str:
    """Tells what is wrong with a row's numbers beside theirs; nothing if they are right. NaN is wrong."""
    found = []
    for name in ("outputs", "gradients"):
        exact, error = row.errors[f"float64 {name}"], row.errors[name]
        if not exact <= EXACT:
            found.append(f"{name} in float64 off by {exact:.1e}")
        least = OTHER_SIGNS if (name, row.precision) == ("gradients", "fp32") else 0.0
        if not error <= max(least, FACTOR * theirs.errors[name]):
            found.append(f"{name} off by {error:.1e}, theirs by {theirs.errors[name]:.1e}")
    return "; ".join(found)


def _time(seconds: float | None, ratio: float | None) -> str:
    return "| |" if seconds is None or ratio is None else f"{1e3 * seconds:.1f} | {ratio:.2f}x |"


def table(rows: Sequence[LiveRow]) -> str:
    """The rows in Markdown: times of a call in ms with the speed over theirs, memory, and what was replaced."""
    lines = [
        "| model, batch | | precision | training step, ms | | inference, ms | | activations, MB | | replaced | joined "
        "| left | error of outputs, gradients | |",
        "|---" * 14 + "|",
    ]
    for row in rows:
        memory = "| "
        if row.activation_bytes is not None:
            ratio = "" if row.memory_ratio is None else f"1/{row.memory_ratio:.1f}"
            memory = f"{row.activation_bytes / 1e6:.1f} | {ratio}"
        errors = ", ".join(f"{row.errors[name]:.0e}" for name in ("outputs", "gradients") if name in row.errors)
        lines.append(
            f"| {row.model}, {row.batch} | {row.variant} | {row.precision} "
            f"| {_time(row.train_seconds, row.train_ratio)} {_time(row.infer_seconds, row.infer_ratio)} {memory} "
            f"| {row.replaced} | {row.joined} | {sum(row.left.values())} | {errors} | {row.note} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[LiveRow], path: Path) -> str:
    """Speed of a training step and of inference over theirs, and memory; a line that says what was done."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state
    except ImportError:
        return "no plot: matplotlib is not installed"
    quantities = {"train_ratio": "training step:\nspeed / theirs", "infer_ratio": "inference:\nspeed / theirs"}
    quantities["memory_ratio"] = "training memory:\ntheirs / ours"
    models = list(dict.fromkeys(row.model for row in rows))
    present = {(row.variant, row.precision) for row in rows if row.variant != THEIRS}
    precisions = dict.fromkeys(row.precision for row in rows)
    series = [(name, precision) for precision in precisions for name in VARIANTS if (name, precision) in present]
    figure = Figure(figsize=(max(6.0, 1.1 * len(models) + 2), 8.4), layout="constrained")
    all_axes = figure.subplots(len(quantities), 1, sharex=True)
    for axes, (quantity, title) in zip(all_axes, quantities.items(), strict=True):
        for index, (variant, precision) in enumerate(series):
            found = {row.model: row for row in rows if (row.variant, row.precision) == (variant, precision)}
            values = [getattr(found[model], quantity, None) or 0.0 if model in found else 0.0 for model in models]
            width = 0.85 / len(series)
            bars = axes.bar(
                [place + width * (index - len(series) / 2) for place in range(len(models))],
                values,
                0.95 * width,
                align="edge",
                color=f"C{VARIANTS.index(variant)}",
                hatch="" if precision == series[0][1] else "////",
                label=f"{variant}, {precision}",
            )
            axes.bar_label(bars, [f"{value:.1f}" if value else "" for value in values], fontsize=5)
        axes.axhline(1.0, color="0.4", lw=0.8)
        axes.set_ylabel(title, fontsize=8)
        axes.margins(y=0.12)
    all_axes[-1].set_yscale("log")
    all_axes[-1].set_xticks(range(len(models)), models, fontsize=7, rotation=20)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=7)
    figure.savefig(path, dpi=130)
    return f"wrote {path}"
