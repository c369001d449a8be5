"""Rows of the memory benchmark, the lines of its table, and the bars they are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from bench.memory_models import OTHERS, OURS, Shape

DEPTH = Shape((3, 32, 32), 3, 8, 128, 16)
RESOLUTION = Shape((3, 256, 256), 4, 32, 512, 1)
HUGE = Shape((3, 1024, 1024), 6, 32, 512, 1)
BARS = {RESOLUTION.image: (40e6, 200e6), HUGE.image: (380e6, None)}  # tensor bytes, resident bytes
DEEP_BAR = (512, 20e6)  # K along the depth, tensor bytes with gradients held
GROWTH_BAR = 1 / 100  # of plain's
GROWTH_BYTES = {(128, 512): 30e3}  # per step, between these depths, with gradients held
SMALL_NETS = "reversible small nets"  # with a memory_budget as small as one net of WRAPPERS needs
REVERSIBLE = ("reversible", SMALL_NETS)
WRAPPERS = ("torch checkpoint", "memcnn")  # ours never needs more than these
BYTES = ("tensor_bytes", "tensor_bytes_fresh", "resident_bytes", "resident_bytes_fresh")


@dataclasses.dataclass
class Row:
    """One case; ``counted``: bytes were not measured but continued from smaller depths.

    ``origin``: machine, versions and commit of a row that an earlier run measured; empty for the file's own run.
    """

    curve: str
    implementation: str
    shape: Shape
    counted: bool = False
    tensor_bytes: float | None = None
    tensor_bytes_fresh: float | None = None
    resident_bytes: float | None = None
    resident_bytes_fresh: float | None = None
    parameter_bytes: int | None = None
    seconds: float | None = None
    gradient_error: float | None = None
    gradient_error_worst: float | None = None
    report: list[dict[str, Any]] | None = None
    at_the_peak: list[dict[str, Any]] | None = None
    at_the_peak_fresh: list[dict[str, Any]] | None = None
    origin: str = ""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Row:
        """Read a row from JSON."""
        return cls(**values | {"shape": Shape.of(values["shape"])})


def earlier(content: dict[str, Any], rows: Sequence[Row], commit: str) -> list[Row]:
    """The rows of an earlier run's JSON that these rows do not have, with their origin.

    What is of our code, plain steps and what wraps them too, is of one build: taken only from a run of the same commit,
    with nothing changed since.
    """
    here = {(row.curve, row.implementation, row.shape) for row in rows if not row.counted}
    facts = content["machine"]
    origin = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['commit']}"
    same = facts["commit"] == commit and commit != "unknown" and not commit.endswith("-dirty")
    found = []
    for row in map(Row.of, content["rows"]):
        if (same or row.implementation in OTHERS) and (row.curve, row.implementation, row.shape) not in here:
            found.append(dataclasses.replace(row, origin=row.origin or origin))
    return found


def straight_line(known: Sequence[Row], n_steps: int) -> dict[str, float]:
    """Continue bytes of tensors (resident sizes are too noisy) and seconds of a step on a straight line.

    The line goes through the two deepest known depths; the values are those at ``n_steps``.
    """
    first, second = sorted(known, key=lambda row: row.shape.n_steps)[-2:]
    found = {}
    for name in (*BYTES[:2], "seconds"):
        low, high = getattr(first, name), getattr(second, name)
        if low is not None and high is not None:
            slope = (high - low) / (second.shape.n_steps - first.shape.n_steps)
            found[name] = high + slope * (n_steps - second.shape.n_steps)
    return found


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


COLUMNS = ("held MB", "fresh MB", "RSS MB", "RSS fresh")  # as BYTES
HEADER = (
    f"{'':22} {'image':>11} {'L':>2} {'K':>4} {'hidden':>6} {'batch':>5}"
    + "".join(f" {name:>9}" for name in (*COLUMNS, "s/step", "error", "worst"))
    + "  spacing, largest drift, trips, redone"
)


def text(row: Row) -> str:
    """Write a row as a line of the table."""
    shape = row.shape
    line = (
        f"{row.implementation:22} {'x'.join(map(str, shape.image)):>11} {shape.n_levels:>2} {shape.n_steps:>4}"
        f" {shape.hidden:>6} {shape.batch:>5}"
    )
    line += "".join(f" {_mb(getattr(row, name)):>9}" for name in BYTES)
    line += f" {'-' if row.seconds is None else f'{row.seconds:.3g}':>9}"
    for value in (row.gradient_error, row.gradient_error_worst):
        line += f" {'-' if value is None else f'{value:.2e}':>9}"
    if row.counted or row.origin:
        return line + "  counted" * row.counted + f"  of {row.origin}" * bool(row.origin)
    if row.report and row.implementation in REVERSIBLE:
        spacing = "/".join(str(level["anchor_every"]) for level in row.report)
        drift = max(level["largest_drift"] for level in row.report)
        trips, redone = (sum(level[name] for level in row.report) for name in ("trips", "redone_steps"))
        line += f"  {spacing}, {drift:.1e}, {trips}, {redone}"
    return line


def _two_deepest(rows: Iterable[Row], name: str) -> dict[str, tuple[Row, Row]]:
    """The two deepest measured rows of each implementation along the depth."""
    known: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.shape.n_steps):
        if row.curve == "depth" and not row.counted and getattr(row, name) is not None:
            known.setdefault(row.implementation, []).append(row)
    return {name: (found[-2], found[-1]) for name, found in known.items() if len(found) >= 2}


def growth(rows: Iterable[Row], name: str) -> dict[str, float]:
    """Bytes more per step and level-run of all levels, by implementation: between its two deepest measured depths."""
    return {
        implementation: (getattr(second, name) - getattr(first, name)) / (second.shape.n_steps - first.shape.n_steps)
        for implementation, (first, second) in _two_deepest(rows, name).items()
    }


def _within(value: float, bar: float) -> str:
    return "within" if value <= bar else "beyond"


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Hold the rows against the bars, in a sentence each."""
    return [*_of_depth(rows), *_of_large_images(rows), *_against_wrappers(rows)]


def _of_depth(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name in BYTES[:2]:
        per_step = growth(rows, name)
        for implementation in OURS[1:]:
            if implementation in per_step and "plain" in per_step:
                share = per_step[implementation] / per_step["plain"]
                lines.append(
                    f"growth per step, {name}, {implementation}: {per_step[implementation] / 1e3:.1f} kB of plain's "
                    f"{per_step['plain'] / 1e3:.0f} kB: 1/{1 / share if share > 0 else float('inf'):.0f}, "
                    f"{_within(share, GROWTH_BAR)} 1/{1 / GROWTH_BAR:.0f}"
                )
    name = BYTES[0]
    for implementation in REVERSIBLE:
        if implementation in (pairs := _two_deepest(rows, name)):
            depths = tuple(row.shape.n_steps for row in pairs[implementation])
            if depths in GROWTH_BYTES:
                size, bar = growth(rows, name)[implementation], GROWTH_BYTES[depths]
                what = f"growth per step from K = {depths[0]} to {depths[1]}, {name}, {implementation}"
                lines.append(f"{what}: {size / 1e3:.1f} kB, {_within(size, bar)} {bar / 1e3:.0f} kB")
    deep, bar = dataclasses.replace(DEPTH, n_steps=DEEP_BAR[0]), DEEP_BAR[1]
    for row in rows:
        if row.curve == "depth" and row.implementation in REVERSIBLE and row.shape == deep and row.tensor_bytes:
            what = f"K = {deep.n_steps}, {row.implementation}: {name} {row.tensor_bytes / 1e6:.1f} MB"
            lines.append(f"{what}, {_within(row.tensor_bytes, bar)} {bar / 1e6:.0f} MB")
    return lines


def _of_large_images(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        standard = row.shape in (RESOLUTION, HUGE)
        if standard and row.implementation == "reversible" and not row.counted:
            tensors, resident = BARS[row.shape.image]
            for name, bar in zip(BYTES, (tensors, tensors, resident, resident), strict=True):
                value = getattr(row, name)
                if bar is not None and value is not None:
                    lines.append(
                        f"{row.shape.image}: {name} {value / 1e6:.1f} MB, {_within(value, bar)} {bar / 1e6:.0f} MB"
                    )
            for what, parts in (("held", row.at_the_peak), ("fresh", row.at_the_peak_fresh)):
                for part in parts or []:
                    size = f"{part['number']} x {part['size'] / 1e6:.2f} MB"
                    lines.append(f"    at the peak, {what}: {size} of {part['op']}")
    return lines


def _against_wrappers(rows: Sequence[Row]) -> list[str]:
    """Compare ours, nets as small as suits, with what wraps steps, at each point of either curve."""
    lines = []
    for name in BYTES[:2]:
        for other in rows:
            bar = getattr(other, name)
            if other.implementation not in WRAPPERS or bar is None:
                continue
            ours = [
                row
                for row in rows
                if (row.curve, row.shape) == (other.curve, other.shape) and row.implementation in REVERSIBLE
            ]
            measured = [row for row in ours if not row.counted and getattr(row, name) is not None]
            if measured:
                least = min(measured, key=lambda row: getattr(row, name))
                value, shape = getattr(least, name), other.shape
                where = f"{'x'.join(map(str, shape.image))}, K = {shape.n_steps}"
                verdict = "not above" if value <= bar else "above"
                counted = " (counted)" * other.counted
                lines.append(
                    f"{where}: {name} of {least.implementation} {value / 1e6:.1f} MB, {verdict} "
                    f"{other.implementation}'s {bar / 1e6:.1f} MB{counted}"
                )
    return lines
