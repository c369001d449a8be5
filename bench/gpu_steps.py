"""What a training step launches on a GPU, and how long the GPU and the clock are at it, counted by torch's profiler.

    python -m bench.gpu_steps [--device cuda] [--config b] [--quick] [--out FILE]

A training step is zero_grad, forward and backward of the mean of -log_prob, as in bench.models: ours in two memory
modes and plain torch with the same tensors, in float32, with TF32 as torch has it by default, and in bfloat16; then
ours as a CUDA graph. Where the clock shows more than the kernels take, the GPU waits for Python. With ``--device cpu``
launches are our operators and those that call no other, and nothing is captured.
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

from bench.harness import machine, synchronize, write_json
from bench.memory_models import Shape
from bench.model_cases import CONFIGS, EAGER, PLAIN, TRAIN, Candidate, Candidates
from bench.models import quick
from bench.precisions import TF32, tf32

WARM_UPS, ROUNDS = 6, 3  # in the warm-ups the anchors' spacing adapts
MARK = "pyglow"  # the namespace of our kernels, and of our operators
GRAPH = "CUDA graph"
MODES = ("store", "reversible")


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One training step: what it launches, of these our own kernels, and milliseconds.

    ``kernel_ms`` is the sum over all launches, ``step_ms`` the median by the clock of steps that end with the GPU.
    """

    implementation: str
    variant: str
    precision: str
    config: str
    shape: Shape
    launches: int
    own_launches: int
    kernel_ms: float
    step_ms: float
    note: str = ""

    @classmethod
    def of(cls, values: dict[str, Any]) -> StepRow:
        """Reads a row from JSON."""
        return cls(**values | {"shape": Shape.of(values["shape"])})


def launched(step: Callable[[], object], device: torch.device) -> tuple[int, int, float]:
    """Launches of a step, how many of them are ours, and their milliseconds together.

    Raises:
        RuntimeError: the profiler saw nothing on the GPU.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        synchronize(device)
    events: list[Any] = list(profiler.events())
    if on_gpu:
        chosen = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        if not chosen:
            raise RuntimeError("the profiler saw no kernel: CUPTI may be missing, or need rights")
    else:
        chosen = [e for e in events if MARK in e.name or not (e.cpu_children or _is_ours(e.cpu_parent))]
    own = [e for e in chosen if MARK in e.name]
    return len(chosen), len(own), sum(e.time_range.elapsed_us() for e in chosen) / 1e3


def _is_ours(event: Any) -> bool:
    return event is not None and MARK in event.name


def row_of(candidate: Candidate, config: str, precision: str, shape: Shape) -> StepRow:
    """Measures one candidate, eager."""
    step = candidate.run(TRAIN)
    note = ""
    if candidate.memory == "reversible":
        step()
    found = _measured(step, candidate.x.device)
    if candidate.memory == "reversible":
        reports = candidate.model.memory_report()
        note = f"anchors every {[r['anchor_every'] for r in reports]}, trips {sum(r['trips'] for r in reports)}"
    return StepRow(candidate.implementation, EAGER, precision, config, shape, *found, note)


def graph_row(model: Any, x: torch.Tensor, memory: str, config: str, precision: str, shape: Shape) -> StepRow:
    """Measures our model's captured step in a memory mode."""
    model.memory = memory
    model.zero_grad(set_to_none=True)
    graphs = model.make_graphed(x)
    found = _measured(lambda: graphs.train_step(x), x.device)
    skipped = sum(report.get("skipped", 0) for report in model.memory_report())
    return StepRow(memory, GRAPH, precision, config, shape, *found, f"{skipped} steps skipped" if skipped else "")


def _measured(step: Callable[[], object], device: torch.device) -> tuple[int, int, float, float]:
    for _ in range(WARM_UPS if device.type == "cuda" else 1):
        step()
    seconds = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return *launched(step, device), 1e3 * statistics.median(seconds)


def rows(config: str, shape: Shape, device: torch.device) -> Iterator[StepRow | str]:
    """All rows; in place of one that cannot be had a line that says why."""
    for precision, dtype in (("fp32", torch.float32), (TF32, torch.float32), ("bf16", torch.bfloat16)):
        with tf32(precision == TF32):
            candidates = Candidates(shape, device, [*MODES, PLAIN], [], dtype, precision == TF32)
            eager = [c for c in candidates.found if c.variant == EAGER and c.dtype == dtype]
            for candidate in eager:
                try:
                    yield row_of(candidate, config, precision, shape)
                except RuntimeError as error:
                    yield f"{candidate.name}: {str(error).strip().splitlines()[0]}"
                candidate.model.zero_grad(set_to_none=True)
            if device.type != "cuda":
                yield "CUDA graphs are left out: they are captured on a GPU alone"
            else:
                for memory in MODES:
                    try:
                        yield graph_row(eager[0].model, candidates.x, memory, config, precision, shape)
                    except (RuntimeError, ValueError) as error:
                        yield f"{GRAPH} of {memory}, {precision}: {str(error).strip().splitlines()[0]}"
            del candidates, eager
            gc.collect()


def table(found: Sequence[StepRow]) -> str:
    """A line a step, as Markdown."""
    lines = [
        "| ours or plain | how | precision | launches | ours | kernels ms | step ms | GPU waits | note |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in found:
        waits = f"{100 * max(0.0, 1 - row.kernel_ms / row.step_ms):.0f} %"
        numbers = f"{row.launches} | {row.own_launches} | {row.kernel_ms:.2f} | {row.step_ms:.2f} | {waits}"
        lines.append(f"| {row.implementation} | {row.variant} | {row.precision} | {numbers} | {row.note} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file after every row.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0; 1 if a row is missing that the device could have.
    """
    options = argparse.ArgumentParser(prog="bench gpu_steps", description="launches of a step", allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    options.add_argument("--config", choices=list(CONFIGS), default="b", help="of bench models (b)")
    options.add_argument("--quick", action="store_true", help="a tiny model: to see that it works")
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = options.parse_args(argv)
    device, shape, facts = arguments.device, CONFIGS[arguments.config], machine(arguments.device)
    if arguments.quick:
        shape = quick(shape)
    found: list[StepRow] = []
    notes: list[str] = []
    for row in rows(arguments.config, shape, device):
        if isinstance(row, str):
            notes += [row] if row not in notes else []
            print(f"note: {row}", flush=True)
        else:
            found.append(row)
            print(table([row]).splitlines()[-1], flush=True)
        if arguments.out is not None:
            write_json(arguments.out, facts, found, notes=notes)
    print(table(found))
    return 1 if notes and device.type == "cuda" else 0


if __name__ == "__main__":
    raise SystemExit(main())
