"""The roofline plot: arithmetic intensity against arithmetic rate, points by op, under both measured ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.harness import Row

MARKERS = "osD^vPX*"


def write(rows: Sequence[Row], path: Path, implementation: str = "pyglow_fast") -> str:
    """Draw the rows of one implementation (those under malloc's default, if both are there); returns what was done.

    The slope is a band: between the slowest and the fastest copy, that from memory and that within a cache. The level
    is the library's matrix product. matplotlib is optional: without it nothing is drawn, and the line returned says so.
    """
    chosen = [row for row in rows if row.implementation == implementation]
    defaults = [row for row in chosen if row.malloc == "default"]
    chosen = defaults or chosen
    if not chosen:
        return f"no roofline: there are no rows of {implementation}"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        return f"no roofline: matplotlib cannot be imported ({error}); pip install matplotlib"
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    peak = max(row.peak_gigaflops for row in chosen)
    copies = [row.copy_gigabytes_per_second for row in chosen]
    intensities = [row.flops / row.bytes for row in chosen]
    span = [0.5 * min(intensities), 2.0 * max(*intensities, peak / min(copies))]
    points = [span[0] * (span[1] / span[0]) ** (i / 100) for i in range(101)]
    slow, fast = ([min(peak, rate * x) for x in points] for rate in (min(copies), max(copies)))
    axes.fill_between(points, slow, fast, color="0.85", label=f"copy, {min(copies):.0f} to {max(copies):.0f} GB/s")
    axes.plot(points, slow, color="0.4", linewidth=1)
    axes.axhline(peak, color="0.4", linewidth=1, linestyle="--", label=f"matrix product, {peak:.0f} GFLOP/s")
    shapes = list(dict.fromkeys(row.shape for row in chosen))
    for index, op in enumerate(dict.fromkeys(row.op for row in chosen)):
        here = [row for row in chosen if row.op == op]
        colour = f"C{index % 10}"
        for row in here:
            marker = MARKERS[shapes.index(row.shape) % len(MARKERS)]
            axes.plot(row.flops / row.bytes, row.gigaflops, marker, color=colour, markersize=5)
        axes.plot([], [], "o", color=colour, label=op)
    for index, shape in enumerate(shapes):
        axes.plot([], [], MARKERS[index % len(MARKERS)], color="0.5", label="x".join(map(str, shape)))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="arithmetic intensity, FLOP per byte",
        ylabel="GFLOP/s",
        title=f"{implementation}, {chosen[0].device}, float32, malloc {chosen[0].malloc}",
    )
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
    return f"wrote {path}"
