"""The plots of the memory benchmark: megabytes against depth and against resolution, both axes logarithmic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

AXES = {"depth": "K, steps per level", "resolution": "side of the image, pixels"}


def _points(rows: Sequence[Mapping[str, Any]], curve: str, implementation: str) -> list[tuple[int, float, bool]]:
    """(position, megabytes, counted), ascending; along the resolution at its greatest depth alone."""
    chosen = [row for row in rows if row["curve"] == curve and row["implementation"] == implementation]
    deepest = max((row["shape"]["n_steps"] for row in chosen), default=0)
    points = []
    for row in chosen:
        shape = row["shape"]
        if curve == "resolution" and shape["n_steps"] != deepest:
            continue
        position = shape["n_steps"] if curve == "depth" else shape["image"][1]
        size = row["tensor_bytes_fresh"] if row["tensor_bytes"] is None else row["tensor_bytes"]  # of a single step
        points.append((position, size / 1e6, row["counted"]))
    return sorted(points)


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, device: str) -> str:
    """memory-depth-DEVICE.png and memory-resolution-DEVICE.png; a line instead where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state
    except ImportError:
        return "no plots: matplotlib is not installed"
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for curve, label in AXES.items():
        lines = {name: points for name in names if (points := _points(rows, curve, name))}
        if not lines:
            continue
        shape = next(row["shape"] for row in reversed(rows) if row["curve"] == curve)
        axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
        for index, (name, points) in enumerate(lines.items()):
            places, sizes = [place for place, _, _ in points], [size for _, size, _ in points]
            ours = name in ("store", "checkpoint", "reversible")
            style: dict[str, Any] = {"color": f"C{index}", "lw": 2 if ours else 1, "ls": "-" if ours else "--"}
            axes.plot(places, sizes, label=f"pyglow_fast, {name}" if ours else name, **style)
            for place, size, hollow in points:
                axes.plot(place, size, "o", ms=5, color=f"C{index}", mfc="white" if hollow else f"C{index}")
        fixed = f"3x{shape['image'][1]}x{shape['image'][2]}" if curve == "depth" else f"K = {shape['n_steps']}"
        axes.set(
            xscale="log",
            yscale="log",
            xlabel=label,
            ylabel="MB beyond parameters and gradients",
            title=f"One training step: {fixed}, L = {shape['n_levels']}, hidden {shape['hidden']}, "
            f"batch {shape['batch']}  (hollow: counted)",
        )
        axes.title.set_fontsize(9)
        axes.set_xticks(
            places := sorted({place for points in lines.values() for place, *_ in points}), map(str, places)
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(folder / f"memory-{curve}-{device}.png", dpi=120)
    return ""
