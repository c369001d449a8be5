"""Counts by torch's profiler what a training step launches on a GPU, and times the GPU and the clock meanwhile.

    python -m bench.gpu_steps [--device cuda] [--quick] [--out FILE]

A training step is zero_grad, forward and backward of the mean of -log_prob, of configuration b of bench models: ours in
two memory modes and plain torch with the same tensors, in float32, with TF32 as torch has it by default, and in
bfloat16; then ours as a CUDA graph. Where the clock shows more than the kernels take, the GPU waits for Python. With
``--device cpu`` launches are our operators and those that call no other, and nothing is captured.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from bench.gpu_kernels import table
from bench.harness import machine, synchronize, write_json
from bench.model_cases import CONFIGS, PLAIN, Shape, build, images, plain_levels
from pyglow_fast import graphed as graphed_step

WARM_UPS, ROUNDS = 6, 3  # in the warm-ups the anchors' spacing adapts
MARK = "pyglow"  # the namespace of our kernels, and of our operators
EAGER, GRAPH = "eager", "CUDA graph"
MODES = ("store", "reversible")
PRECISIONS = ("fp32", "tf32", "bf16")
QUICK = Shape((3, 16, 16), n_levels=3, n_steps=2, hidden=8, batch=2)


COLUMNS = ["implementation", "variant", "precision", "launches", "ours", "kernels_ms", "step_ms", "note"]
Row = dict[str, Any]


def measured(step: Callable[[], object], device: torch.device) -> Row:
    """Counts a step's launches and those of them that are ours, adds up their milliseconds, and takes the clock.

    Raises:
        RuntimeError: the profiler saw nothing on the GPU.
    """
    on_gpu = device.type == "cuda"
    for _ in range(WARM_UPS if on_gpu else 1):
        step()
    seconds = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        synchronize(device)
    events: list[Any] = list(profiler.events())
    if on_gpu:
        chosen = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        if not chosen:
            raise RuntimeError("the profiler saw no kernel: CUPTI may be missing, or need rights")
    else:
        inside = {id(child) for e in events if MARK in e.name for child in e.cpu_children}
        kernels = [e for e in events if MARK in e.name and not any(MARK in child.name for child in e.cpu_children)]
        chosen = [*kernels, *(e for e in events if not (MARK in e.name or e.cpu_children or id(e) in inside))]
    return {
        "launches": len(chosen),
        "ours": sum(MARK in e.name for e in chosen),
        "kernels_ms": sum(e.time_range.elapsed_us() for e in chosen) / 1e3,
        "step_ms": 1e3 * statistics.median(seconds),
    }


def eager(model: Any, x: torch.Tensor, autocast: bool) -> Callable[[], object]:
    """A training step."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = -model.log_prob(x).mean()
        loss.backward()

    return step


def graphed(model: Any, x: torch.Tensor) -> Callable[[], object]:
    """The replay of a captured one, from the fourth call on."""
    graphs = graphed_step(model)
    return lambda: graphs(x)


def rows(shape: Shape, device: torch.device) -> Iterator[Row]:
    """All rows; one that cannot be had has no launches, and a note that says why."""
    x = images(shape, device)
    steps = [(name, EAGER) for name in (*MODES, PLAIN)]
    if device.type == "cuda":
        steps += [(name, GRAPH) for name in MODES]
    for precision in PRECISIONS:
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        bf16 = precision == "bf16"
        ours: Any = build(MODES[0], shape, "auto", device)
        plain: Any = plain_levels(ours, PLAIN)
        for name, variant in steps:
            row = {"implementation": name, "variant": variant, "precision": precision}
            model = plain if name == PLAIN else ours
            ours.precision = "bf16" if bf16 and model is ours else "fp32"
            ours.memory = name if model is ours else MODES[0]
            try:
                step = graphed(ours, x) if variant == GRAPH else eager(model, x, bf16 and model is plain)
                found = measured(step, device)
                yield row | found | {"note": note_of(ours.memory_report()) if model is ours else ""}
            except (RuntimeError, ValueError) as error:
                yield row | {"note": str(error).strip().splitlines()[0]}
        del ours, plain
        gc.collect()


def note_of(reports: Sequence[dict[str, Any]]) -> str:
    """Tells where a reversible backward keeps states, and how often it had to redo steps or leave one out."""
    trips, skipped = (sum(report.get(name, 0) for report in reports) for name in ("trips", "skipped"))
    return f"anchors every {[report.get('anchor_every') for report in reports]}, {trips} trips, {skipped} skipped"


def cells(row: Row) -> list[object]:
    """A row's values, and the share of the step in which the GPU waits for Python."""
    waits = f"{100 * max(0.0, 1 - row['kernels_ms'] / row['step_ms']):.0f} %" if "step_ms" in row else "-"
    values = [row.get(name, "-") for name in COLUMNS]
    return [*(f"{value:.2f}" if isinstance(value, float) else value for value in values), waits]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file after every row; 1 if a row is missing.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="bench gpu_steps", description="launches of a step", allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    options.add_argument("--quick", action="store_true", help="a tiny model: to see that it works")
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = options.parse_args(argv)
    shape, facts = QUICK if arguments.quick else CONFIGS["b"], machine(arguments.device)
    print(f"a training step, by the profiler and the clock: {shape}", flush=True)
    found: list[Row] = []
    for row in rows(shape, arguments.device):
        found.append(row)
        print(*cells(row), sep=", ", flush=True)
        if arguments.out is not None:
            write_json(arguments.out, facts, found, shape=dataclasses.asdict(shape))
    print(f"\n{table([*COLUMNS, 'GPU waits'], map(cells, found))}")
    return 0 if all("launches" in row for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
