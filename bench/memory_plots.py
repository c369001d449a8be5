"""The plots of the memory benchmark: megabytes against depth and against resolution, and time against megabytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.memory_models import OURS
from bench.memory_rows import SMALL_NETS

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
            ours = name in (*OURS, SMALL_NETS)
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


def draw_budgets(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Time against bytes, a panel a case; a line that says what was done.

    Each at its faster setting of malloc, over plain's. Ours with bytes given are one line, from one mode to the other.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed"
    timed = [row for row in rows if row["seconds"]]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    cases = [case for case in cases if any((row["case"], row["variant"]) == (case, "plain") for row in timed)]
    if not cases:
        return "no plot: nothing was timed beside plain"
    figure = Figure(figsize=(4.2 * min(2, len(cases)) + 1, 3.6 * -(-len(cases) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(cases) // 2), min(2, len(cases)), squeeze=False).flatten()
    for axes in panels[len(cases) :]:
        axes.remove()
    for axes, case in zip(panels, cases, strict=False):
        _panel(axes, [row for row in timed if row["case"] == case])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=120)
    return f"wrote {path}"


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one case: time over that of plain torch, against megabytes."""
    shape = rows[0]["shape"]
    plain = next(_best(row) for row in rows if row["variant"] == "plain")
    places = {row["variant"]: (_peak(row) / 1e6, _best(row) / plain) for row in rows}

    def line(names: Sequence[str], style: str, **more: Any) -> None:
        points = sorted(places[name] for name in names)
        axes.plot([size for size, _ in points], [time for _, time in points], style, **more)

    def name_points(names: Sequence[str], offset: tuple[int, int], **more: Any) -> None:
        for name in names:
            text = {"plain": "none", "torch checkpoint": "all"}.get(name, name.removeprefix("torch checkpoint "))
            axes.annotate(text, places[name], xytext=offset, textcoords="offset points", fontsize=7, **more)

    modes = [name for name in ("reversible", "store") if name in places]
    given = [name for name in places if name.endswith("%")]
    peers = [name for name in places if name == "plain" or name.startswith("torch checkpoint")]
    line(modes, ":", color="0.5", lw=1, label="straight line between the modes")
    line([*modes, *given], "o-", color="C0", label="pyglow_fast, bytes given")
    if "checkpoint" in places:
        axes.plot(*places["checkpoint"], "s", color="C0", mfc="white", label='pyglow_fast, "checkpoint"')
    line(peers, "D--", ms=4, color="C3", label="torch.utils.checkpoint around so many steps")
    name_points([name for name in given if name != "100 %"], (4, 4))  # which lies where "store" does
    name_points(modes[:1], (-6, 8))
    name_points(modes[1:], (-6, -12))
    name_points(peers, (4, 4), color="C3")
    size = "x".join(map(str, shape["image"]))
    model = f"L = {shape['n_levels']}, K = {shape['n_steps']}, hidden {shape['hidden']}, batch {shape['batch']}"
    axes.set_title(f"({rows[0]['case']}) {size}, {model}", fontsize=8)
    axes.set(xlabel="MB beyond parameters and gradients", ylabel="time of a step / plain's")
    axes.margins(x=0.12, y=0.2)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _peak(row: Mapping[str, Any]) -> float:
    return max(float(row[name] or 0) for name in ("tensor_bytes", "tensor_bytes_fresh"))


def _best(row: Mapping[str, Any]) -> float:
    return min(float(median) for median, *_ in row["seconds"].values())
