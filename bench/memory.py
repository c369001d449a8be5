"""Training memory against depth and against resolution, with time and gradient error beside it.

    pyglow-fast bench memory [--quick | --full] [--device cpu] [--only depth,resolution,gradients] [--budget BYTES]
                             [--run FOLDER] [--out DIR]

The memory of one training step (forward and backward) beyond parameters and gradients, each case in a fresh process;
bench/memory_case.py says what is counted. Where a case would not fit --limit or take too long, its bytes are *counted*:
continued along the straight line through two smaller depths of the same images. ``held``: gradients allocated before.
``fresh``: gradients begin as None, and what becomes one is not counted. Ours includes the anchors. For the gradients
see bench/memory_gradients.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import memory_gradients
from bench.harness import ROOT, machine, write_json
from bench.memory_case import Case, run_case
from bench.memory_models import IMPLEMENTATIONS, OURS, PACKAGES, Shape
from bench.memory_plots import draw

DEPTH = Shape((3, 32, 32), 3, 8, 128, 16)
RESOLUTION = Shape((3, 256, 256), 4, 32, 512, 1)
HUGE = Shape((3, 1024, 1024), 6, 32, 512, 1)
BARS = {RESOLUTION.image: (64e6, 200e6), HUGE.image: (400e6, None)}  # tensor bytes, resident bytes
GROWTH_BAR = 1 / 100
ADAPTING = 4  # more passes, after which the anchors have moved apart for the first time
STEPS_OF_A_CASE = 5  # training steps that a case takes at least, and building the model
BYTES = ("tensor_bytes", "tensor_bytes_fresh", "resident_bytes", "resident_bytes_fresh")


@dataclasses.dataclass
class Row:
    """One case; ``counted``: bytes were not measured but continued from smaller depths."""

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


class Runner:
    """Runs cases in processes of their own and prints a line for each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.limit = int(options.limit * 2**30)
        self.lines: list[str] = []
        self.missing: set[str] = set()

    def note(self, line: str) -> None:
        """Print, and keep for the JSON."""
        print(line, flush=True)
        self.lines.append(line)

    def case(self, implementation: str, shape: Shape, passes: int, errors: bool) -> dict[str, Any] | None:
        """The result, or None with a printed reason."""
        options = self.options
        case = Case(
            implementation, shape, options.budget, passes, errors, str(options.device), options.threads, self.limit
        )
        name = f"{implementation}, {shape}"
        result = self._here(case) if options.device.type == "cuda" else self._elsewhere(case, name)
        if result is None:
            return None
        if "missing" in result:
            self.missing.add(implementation)
            package = PACKAGES.get(implementation, implementation)
            self.note(f"{implementation} is left out: {result['missing']}; pip install {package}")
            return None
        if "too_large" in result:
            self.note(f"{name}: more than {self.limit / 2**30:.0f} GiB")
            return None
        return result

    def _here(self, case: Case) -> dict[str, Any]:
        """On CUDA, where the allocator tells what a process of its own would tell on the CPU."""
        result = run_case(case)
        gc.collect()
        torch.cuda.empty_cache()
        return result

    def _elsewhere(self, case: Case, name: str) -> dict[str, Any] | None:
        command = [sys.executable, "-m", "bench.memory_case", case.text()]
        seconds = self.options.seconds
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            self.note(f"{name}: more than {seconds:.0f} s")
            return None
        if done.returncode != 0:
            self.note(f"{name}: failed ({done.returncode})\n{done.stderr[-2000:]}")
            return None
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def rows(self, curve: str, implementation: str, shapes: Sequence[Shape], probe: bool) -> Iterator[Row]:
        """Of shapes that differ in depth only, ascending; with ``probe``, two shallow ones come before."""
        shallow = [dataclasses.replace(shapes[0], n_steps=k) for k in (1, 2) if probe and k < shapes[0].n_steps]
        known: list[Row] = []
        for shape in [*shallow, *shapes]:
            if implementation in self.missing:
                return
            row = Row(curve, implementation, shape)
            line = straight_line(known, shape.n_steps) if len(known) >= 2 else None
            deep = shape.n_steps > 32 or shape.image[1] > 128
            too_large = line is not None and line["tensor_bytes"] > 0.9 * self.limit
            too_long = line is not None and STEPS_OF_A_CASE * line.get("seconds", 0.0) > self.options.seconds
            spare = shape not in shallow and probe and self.options.quick
            if not (too_large or too_long or spare):
                errors = shape.n_steps <= 32 and shape.image[1] <= 32
                passes = self.options.passes
                if implementation == "reversible" and shape != HUGE:
                    passes += ADAPTING
                elif deep:
                    passes = min(passes, 1)
                result = self.case(implementation, shape, passes, errors)
                if result is not None:
                    row = dataclasses.replace(row, **result)
            if row.tensor_bytes_fresh is None and line is not None:
                row.counted = True
                for name in BYTES[:2]:
                    setattr(row, name, line.get(name))
            if row.tensor_bytes_fresh is not None:
                print(text(row), flush=True)
                if not row.counted:
                    known.append(row)
                yield row


def straight_line(known: Sequence[Row], n_steps: int) -> dict[str, float]:
    """At a depth, on the line through the two deepest known ones: the bytes of tensors (resident sizes are too noisy),
    and the seconds of a step.
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
    f"{'':16} {'image':>11} {'L':>2} {'K':>4} {'hidden':>6} {'batch':>5}"
    + "".join(f" {name:>9}" for name in (*COLUMNS, "s/step", "error", "worst"))
    + "  spacing, largest drift, trips, redone"
)


def text(row: Row) -> str:
    """A line of the table."""
    shape = row.shape
    line = (
        f"{row.implementation:16} {'x'.join(map(str, shape.image)):>11} {shape.n_levels:>2} {shape.n_steps:>4}"
        f" {shape.hidden:>6} {shape.batch:>5}"
    )
    line += "".join(f" {_mb(getattr(row, name)):>9}" for name in BYTES)
    line += f" {'-' if row.seconds is None else f'{row.seconds:.3g}':>9}"
    for value in (row.gradient_error, row.gradient_error_worst):
        line += f" {'-' if value is None else f'{value:.2e}':>9}"
    if row.counted:
        return line + "  counted"
    if row.report and row.implementation == "reversible":
        spacing = "/".join(str(level["anchor_every"]) for level in row.report)
        drift = max(level["largest_drift"] for level in row.report)
        trips, redone = (sum(level[name] for level in row.report) for name in ("trips", "redone_steps"))
        line += f"  {spacing}, {drift:.1e}, {trips}, {redone}"
    return line


def growth(rows: Iterable[Row], name: str) -> dict[str, float]:
    """Bytes more per step and level-run of all levels, by implementation: between its two deepest measured depths."""
    found = {}
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        if row.curve == "depth" and not row.counted and getattr(row, name) is not None:
            by_name.setdefault(row.implementation, []).append(row)
    for implementation, known in by_name.items():
        if len(known) >= 2:
            first, second = sorted(known, key=lambda row: row.shape.n_steps)[-2:]
            steps = second.shape.n_steps - first.shape.n_steps
            found[implementation] = (getattr(second, name) - getattr(first, name)) / steps
    return found


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say about the bars."""
    lines = []
    for name in ("tensor_bytes", "tensor_bytes_fresh"):
        per_step = growth(rows, name)
        for implementation in OURS[1:]:
            if implementation in per_step and "plain" in per_step:
                share = per_step[implementation] / per_step["plain"]
                verdict = "within" if share <= GROWTH_BAR else "beyond"
                lines.append(
                    f"growth per step, {name}, {implementation}: {per_step[implementation] / 1e3:.1f} kB of plain's "
                    f"{per_step['plain'] / 1e3:.0f} kB: 1/{1 / share if share > 0 else float('inf'):.0f}, "
                    f"{verdict} 1/{1 / GROWTH_BAR:.0f}"
                )
    for row in rows:
        standard = row.shape in (RESOLUTION, HUGE)
        if standard and row.implementation == "reversible" and not row.counted:
            tensors, resident = BARS[row.shape.image]
            for name, bar in zip(BYTES, (tensors, tensors, resident, resident), strict=True):
                value = getattr(row, name)
                if bar is not None and value is not None:
                    verdict = "within" if value <= bar else "beyond"
                    lines.append(f"{row.shape.image}: {name} {value / 1e6:.1f} MB, {verdict} {bar / 1e6:.0f} MB")
            for what, parts in (("held", row.at_the_peak), ("fresh", row.at_the_peak_fresh)):
                for part in parts or []:
                    size = f"{part['number']} x {part['size'] / 1e6:.2f} MB"
                    lines.append(f"    at the peak, {what}: {size} of {part['op']}")
    return lines


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="bench memory", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for memory-DEVICE.json and the plots")
    options.add_argument("--quick", action="store_true", help="shallow models and small images")
    options.add_argument("--full", action="store_true", help="also K = 512 and images of 1024 pixels: very long")
    options.add_argument("--only", default="depth,resolution,gradients", help="parts, separated by commas")
    options.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="separated by commas")
    options.add_argument("--depths", help="K, separated by commas, in place of the standard ones")
    options.add_argument("--sizes", help="sides of the images, separated by commas, in place of the standard ones")
    options.add_argument("--budget", type=lambda s: s if s == "auto" else int(s), default="auto", help="memory_budget")
    options.add_argument("--limit", type=float, default=8.0, metavar="GIB", help="of a case; beyond, it is counted")
    options.add_argument("--seconds", type=float, default=1800.0, help="of a case; beyond, it is counted")
    options.add_argument(
        "--passes",
        type=int,
        default=3,
        help="training steps of a case before bytes are counted; 0: all is read off a single step",
    )
    options.add_argument("--run", type=Path, metavar="FOLDER", help="run folder with trained weights, for gradients")
    options.add_argument("--training", type=int, default=60, help="training steps without --run")
    return options.parse_args(argv)


def _depths(options: argparse.Namespace) -> list[Shape]:
    standard = [8, 16] if options.quick else [8, 32, 128] + ([512] if options.full else [])
    steps = [int(k) for k in options.depths.split(",")] if options.depths else standard
    return [dataclasses.replace(DEPTH, n_steps=k) for k in sorted(steps)]


def _sizes(options: argparse.Namespace) -> list[Shape]:
    standard = [32, 64] if options.quick else [64, 128, 256] + ([HUGE.image[1]] if options.full else [])
    sides = [int(side) for side in options.sizes.split(",")] if options.sizes else standard
    shapes = [
        HUGE if side == HUGE.image[1] else dataclasses.replace(RESOLUTION, image=(3, side, side)) for side in sides
    ]
    if options.quick and not options.sizes:
        shapes = [dataclasses.replace(shape, n_steps=8, hidden=64) for shape in shapes]
    return sorted(shapes, key=lambda shape: shape.image[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw.

    Args:
        argv: the options; those of the process if None.
    """
    options = _options(argv)
    runner, parts = Runner(options), options.only.split(",")
    chosen = [name for name in IMPLEMENTATIONS if name in options.implementations.split(",")]
    rows: list[Row] = []
    print(HEADER)
    if "depth" in parts:
        for implementation in chosen:
            rows += runner.rows("depth", implementation, _depths(options), probe=False)
    if "resolution" in parts:
        for implementation in chosen:
            for shape in _sizes(options):
                # Only others are continued from shallow depths; of ours, all is measured.
                rows += runner.rows("resolution", implementation, [shape], probe=implementation not in OURS[1:])
    for line in verdicts(rows):
        runner.note(line)
    gradients: list[memory_gradients.GradientRow] = []
    if "gradients" in parts:
        torch.set_num_threads(options.threads)
        for row in memory_gradients.measure(options.device, options.run, options.training, options.quick):
            if isinstance(row, str):
                runner.note(row)
            else:
                gradients.append(row)
        print(memory_gradients.table(gradients))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = machine(options.device) | {"limit_gib": str(options.limit), "budget": str(options.budget)}
        more = {"gradients": [dataclasses.asdict(row) for row in gradients], "notes": runner.lines}
        write_json(options.out / f"memory-{options.device.type}.json", facts, rows, **more)
        note = draw([dataclasses.asdict(row) for row in rows], options.out, options.device.type)
        if note:
            print(note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
