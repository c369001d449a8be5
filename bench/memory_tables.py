"""The tables of README.md and docs/memory.md that say what training takes: bytes, budgets, errors of gradients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench import scaling
from bench.doc_table import Table, coarse, is_there, made, read, short
from bench.memory_budgets import PEERS, PERCENTS, BudgetRow, straight_line
from bench.memory_gradients import GradientRow
from bench.memory_models import OTHERS, Shape
from bench.memory_rows import DEPTH, HUGE, RESOLUTION
from bench.memory_rows import Row as MemoryRow
from bench.model_cases import CHECKPOINTED, MEMCNN, PLAIN

HARD = {
    "trained 60 steps, K=32, L=3": "trained 60 steps, K = 32, L = 3",
    "strongly scaled nets (0.0275), K=32": "strongly scaled nets (0.0275), K = 32",
    "strongly scaled nets (0.0275), K=64": "the same, K = 64",
    "strongly scaled nets (0.03), K=64": "strongly scaled nets (0.03), K = 64",
    "strongly scaled nets (0.05), K=32": "strongly scaled nets (0.05), K = 32",
}
MEMORY_NAMES = {
    "store": "ours, store",
    "checkpoint": "ours, checkpoint",
    "reversible": "**ours, reversible**",
    PLAIN: PLAIN,
    CHECKPOINTED: "torch.utils.checkpoint",
    MEMCNN: MEMCNN,
    "normflows": "normflows",
    "FrEIA": "FrEIA",
}
EARLIER = "memory-earlier-cpu.json"
MEMORY_FILES = (*scaling.MEMORY_FILES, EARLIER)


class Measured(NamedTuple):
    """A row, and whether it is of an earlier build of ours."""

    row: MemoryRow
    is_earlier: bool


def memory_rows() -> dict[tuple[str, str, Shape], Measured]:
    """The rows by curve, implementation and shape; of those that several files have, the first file's."""
    found: dict[tuple[str, str, Shape], Measured] = {}
    for name in MEMORY_FILES:
        for row in map(MemoryRow.of, read(name)["rows"] if is_there(name) else []):
            is_earlier = name == EARLIER and row.implementation not in OTHERS
            found.setdefault((row.curve, row.implementation, row.shape), Measured(row, is_earlier))
    return found


def _depth(k: int) -> Shape:
    return dataclasses.replace(DEPTH, n_steps=k)


def _side(pixels: int) -> Shape:
    return HUGE if pixels == HUGE.image[1] else dataclasses.replace(RESOLUTION, image=(3, pixels, pixels))


def megabytes(found: Measured | None, written: Callable[[float], str] = short) -> str:
    """Write the MB of tensors with gradients held, or of what was measured without; and what is to be said of them."""
    if found is None:
        return ""
    row = found.row
    size = row.tensor_bytes if row.tensor_bytes is not None else row.tensor_bytes_fresh
    return "" if size is None else written(size / 1e6) + " (counted)" * row.counted + " (earlier)" * found.is_earlier


def memory_table(curve: str, head: Sequence[str], shapes: Sequence[Shape], resident: Shape) -> Table:
    """docs/memory.md: one of the two curves; of mode "reversible" the resident size at one of its points, too."""
    rows = memory_rows()
    lines = []
    for name, label in MEMORY_NAMES.items():
        cells = [megabytes(rows.get((curve, name, shape))) for shape in shapes]
        if name == "reversible" and (found := rows.get((curve, name, resident))) and found.row.resident_bytes:
            cells[shapes.index(resident)] += f", resident size {short(found.row.resident_bytes / 1e6)}"
        lines.append((label, *cells))
    return made("docs/memory.md", head, lines)


def depths() -> Table:
    """docs/memory.md: memory against depth."""
    steps = (8, 32, 128, 512)
    head = ("MB (held)", "K = 8", *map(str, steps[1:]))
    return memory_table("depth", head, [_depth(k) for k in steps], _depth(512))


def resolutions() -> Table:
    """docs/memory.md: memory against resolution."""
    head = ("MB (held)", "64 px", "128 px", "256 px", "1024 px, L = 6")
    return memory_table("resolution", head, [_side(side) for side in (64, 128, 256, 1024)], RESOLUTION)


def readme_memory() -> Table:
    """README.md: memory at three resolutions."""
    rows = memory_rows()
    groups = {
        "ours, reversible": ("reversible",),
        "memcnn / torch.utils.checkpoint around plain steps": (MEMCNN, CHECKPOINTED),
        "plain torch": (PLAIN,),
        "FrEIA / normflows": ("FrEIA", "normflows"),
    }
    lines = []
    for label, names in groups.items():
        cells = []
        for side in (64, 256, 1024):
            sizes = [megabytes(rows.get(("resolution", name, _side(side))), coarse) for name in names]
            text = " / ".join(sizes) if any(sizes) else "-"
            cells.append(f"**{text}**" if label.startswith("ours") else text)
        lines.append((label, *cells))
    return made("README.md", ("", "3x64x64, L = 4", "3x256x256, L = 4", "3x1024x1024, L = 6"), lines)


def budgets() -> Table:
    """docs/memory.md: time against bytes in case (c)."""
    rows = {}
    for values in read("memory-budgets-cpu.json")["rows"]:
        row = BudgetRow(**values | {"shape": Shape.of(values["shape"])})
        if row.case == "c":
            rows[row.variant] = row
    seconds = {name: min(median for median, *_ in row.seconds.values()) for name, row in rows.items()}
    lines: list[Sequence[object]] = []

    def mode(name: str) -> None:
        lines.append((f"ours, {name}", "", short(rows[name].peak / 1e6), "", short(1e3 * seconds[name]), ""))

    mode("reversible")
    for percent in PERCENTS:
        name = f"{percent} %"
        row = rows[name]
        assert row.budget is not None
        line = straight_line(seconds["reversible"], seconds["store"], percent)
        shares = short(row.budget / 1e6), short(row.peak / 1e6), f"{row.peak / row.budget:.2f}"
        lines.append((name, *shares, short(1e3 * seconds[name]), f"{seconds[name] / line:.2f}"))
    mode("store")
    label = "plain torch; a quarter, a half, three quarters, all of its steps in torch.utils.checkpoint"
    sizes, taken = (
        "; ".join([cells[0], ", ".join(cells[1:])])
        for cells in ([short(rows[name].peak / 1e6) for name in PEERS], [short(1e3 * seconds[name]) for name in PEERS])
    )
    lines.append((label, "", sizes, "", taken, ""))
    head = ("", "bytes given, MB", "peak, MB", "of the budget", "training step, ms")
    return made("docs/memory.md", (*head, "over the straight line between the modes"), lines)


def _ratio(value: float) -> str:
    if not math.isfinite(value):
        return "NaN"
    if value >= 1e5:
        return f"{value:.0e}".replace("e+0", "e")
    return f"{value:.2f}" if value < 2 else short(value)


def gradients() -> Table:
    """docs/memory.md: errors of gradients over those of stored float32."""
    contents = [read(name)["gradients"] for name in MEMORY_FILES if is_there(name)]
    rows = [GradientRow(**values) for values in next(filter(None, contents))]
    found = {(row.case, row.implementation): row for row in rows}
    lines = []
    for case, label in HARD.items():
        ours, memcnn, unchecked = (found[case, name] for name in ("reversible", MEMCNN, "no tolerance"))
        redone = f"{ours.trips}, {ours.redone_steps} of {ours.steps * ours.passes}"
        redone += ", then anchors at every step" * (set(ours.spacing) == {1})
        ratios = ours.ratio, ours.ratio_worst_tensor
        lines.append((label, *map(_ratio, ratios), redone, _ratio(memcnn.ratio), _ratio(unchecked.ratio)))
    head = ("case", "ours, reversible", "worst tensor", "training steps with drift, flow steps redone", "memcnn")
    return made("docs/memory.md", (*head, "reversible without checks"), lines)
