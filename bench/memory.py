"""Training memory against depth and against resolution, with time and gradient error beside it.

    pyglow-fast bench memory [--quick | --full] [--device cpu] [--only depth,resolution,gradients] [--budget BYTES]
                             [--run FOLDER] [--others JSON ...] [--out DIR]
    pyglow-fast bench memory --only large [--sizes 256,1024] [--depths 4,16] [--device cuda] [--out DIR]
    pyglow-fast bench memory --budgets [--cases a,b,c,e] [--rounds 7] [--quick] [--out DIR]

The memory of one training step (forward and backward) beyond parameters and gradients, each case in a fresh process;
bench/memory_case.py says what is counted. Where a case would not fit --limit or take too long, its bytes are *counted*:
continued along the straight line through two smaller depths of the same images. ``held``: gradients allocated before.
``fresh``: gradients begin as None, and what becomes one is not counted. Ours includes the anchors. "reversible small
nets" gives one net --small-nets bytes, as few as one net of what wraps steps needs. --others takes rows that are not
measured now from earlier runs' JSON, and says so: of normflows and FrEIA, of the others where the commit is the same,
so that a long run can be made in pieces. ``large`` is the depth on images of 256 and 1024 pixels, which takes a GPU. Of
small cases the errors of gradients are found too if ``gradients`` is among the parts; for that part itself see
bench/memory_gradients.py, for --budgets, which draws time against bytes, bench/memory_budgets.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import memory_budgets, memory_gradients
from bench.harness import commit, machine, write_json
from bench.memory_models import OTHERS, OURS, SAME_FUNCTION, Shape
from bench.memory_plots import draw
from bench.memory_rows import DEPTH, HEADER, HUGE, RESOLUTION, SMALL_NETS, Row, earlier, text, verdicts
from bench.memory_runner import Runner

CHOICES = (*OURS, SMALL_NETS, *SAME_FUNCTION, *OTHERS)
LARGE_SIDES, LARGE_DEPTHS = "256,1024", "4,16"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="bench memory", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for memory-DEVICE.json and the plots")
    options.add_argument("--quick", action="store_true", help="shallow models and small images")
    options.add_argument("--full", action="store_true", help="also K = 512 and images of 1024 pixels: very long")
    options.add_argument("--only", default="depth,resolution,gradients", help="parts, separated by commas; or large")
    options.add_argument("--implementations", default=",".join(CHOICES), help="separated by commas")
    options.add_argument("--depths", help="K, separated by commas, in place of the standard ones")
    options.add_argument("--sizes", help="sides of the images, separated by commas, in place of the standard ones")
    options.add_argument("--budget", type=lambda s: s if s == "auto" else int(s), default="auto", help="memory_budget")
    options.add_argument("--small-nets", type=int, default=4 * 2**20, metavar="BYTES", help=f"of {SMALL_NETS} (4 MiB)")
    options.add_argument("--limit", type=float, default=8.0, metavar="GIB", help="of a case; beyond, it is counted")
    options.add_argument("--seconds", type=float, default=1800.0, help="of a case; beyond, it is counted")
    options.add_argument(
        "--passes",
        type=int,
        default=3,
        help="training steps of a case before bytes are counted; 0: one, and no resident sizes",
    )
    options.add_argument("--run", type=Path, metavar="FOLDER", help="run folder with trained weights, for gradients")
    options.add_argument("--training", type=int, default=60, help="training steps without --run")
    options.add_argument(
        "--others", type=Path, nargs="+", default=[], metavar="JSON", help="earlier runs, for what is not measured"
    )
    memory_budgets.add_options(options)
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


def _large(options: argparse.Namespace) -> list[list[Shape]]:
    """Give the depths of the models of the resolution's curve, by side."""
    sides = [int(side) for side in (options.sizes or LARGE_SIDES).split(",")]
    steps = sorted(int(k) for k in (options.depths or LARGE_DEPTHS).split(","))
    found = []
    for side in sides:
        base = HUGE if side == HUGE.image[1] else dataclasses.replace(RESOLUTION, image=(3, side, side))
        if options.quick:
            base = dataclasses.replace(base, hidden=16)
        found.append([dataclasses.replace(base, n_steps=k) for k in steps])
    return found


def _replaced(row: Row, taken: Sequence[Row]) -> bool:
    """Tell whether an earlier run has measured a row that this one has only counted."""
    same = [(other.curve, other.implementation, other.shape) for other in taken]
    return row.counted and (row.curve, row.implementation, row.shape) in same


def _write(
    options: argparse.Namespace,
    runner: Runner,
    rows: Sequence[Row],
    gradients: Sequence[memory_gradients.GradientRow],
) -> None:
    """Write memory-DEVICE.json, if there is a folder for it."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = machine(options.device) | {"threads": str(options.threads)}  # of the cases' own processes
        facts |= {"limit_gib": str(options.limit), "budget": str(options.budget)}
        more = {"gradients": [dataclasses.asdict(row) for row in gradients], "notes": runner.lines}
        write_json(options.out / f"memory-{options.device.type}.json", facts, rows, **more)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw.

    Args:
        argv: the options; those of the process if None.
    """
    options = _options(argv)
    if options.budgets:
        return memory_budgets.run(options)
    runner, parts = Runner(options), options.only.split(",")
    chosen = [name for name in CHOICES if name in options.implementations.split(",")]
    rows: list[Row] = []
    print(HEADER)
    if "depth" in parts:
        for implementation in chosen:
            rows += runner.rows("depth", implementation, _depths(options), probe=False)
            _write(options, runner, rows, [])  # a run that is stopped leaves what it has
    if "resolution" in parts:
        for implementation in chosen:
            for shape in _sizes(options):
                if implementation == SMALL_NETS and shape == HUGE:
                    continue  # for minutes, where no wrapper is near
                # Only others are continued from shallow depths; of ours, all is measured.
                probe = implementation not in (*OURS[1:], SMALL_NETS)
                rows += runner.rows("resolution", implementation, [shape], probe=probe)
                _write(options, runner, rows, [])
    if "large" in parts:
        for shapes in _large(options):
            for implementation in chosen:
                rows += runner.rows(f"depth at {shapes[0].image[1]}", implementation, shapes, probe=False)
                _write(options, runner, rows, [])
    for path in options.others:
        taken = earlier(json.loads(path.read_text(encoding="utf-8")), rows, commit())
        print("\n".join(text(row) for row in taken))
        rows = [row for row in rows if not _replaced(row, taken)] + taken
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
    _write(options, runner, rows, gradients)
    if options.out is not None:
        note = draw([dataclasses.asdict(row) for row in rows], options.out, options.device.type)
        if note:
            print(note)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
