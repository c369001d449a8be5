"""Measures what a call costs besides its kernel: functions on tensors of four numbers, and a flow step at one pixel.

    python -m bench.calls [--calls 2000] [--out DIR]

On one thread. Every call is timed by itself, and the median of all counts; cases take turns in blocks. The floor is
what torch asks for: an addition, and an autograd function that hands its input on. With a record means that the tensors
require gradients, and counts the forward alone.

A flow step is the share of one step in a forward and backward of ``STEPS`` of them, of 12 channels, at 1 x 1 pixels.
Its kernels are the ops of this package that ran in it, called again with the same arguments; the rest is Python,
torch's dispatcher and torch's own small ops.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import WARM_UP_ROUNDS, machine, write_json
from pyglow_fast import functional
from pyglow_fast.layers import FlowStep, ReversibleSequence
from pyglow_fast.reference import CouplingSpec

STEPS, CHANNELS, HIDDEN = 8, 12, 32
BLOCK = 50  # calls of one case before the next one's turn
CPU = torch.device("cpu")
Case = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class CallRow:
    """Seconds of a call: the median and the 20 and 80 % quantiles."""

    case: str
    record: bool
    calls: int
    seconds: float
    seconds_low: float
    seconds_high: float


@dataclasses.dataclass(frozen=True)
class StepRow:
    """Seconds of a flow step's forward and backward, of its kernels alone, and the difference."""

    memory: str
    calls: int
    seconds: float
    kernel_seconds: float
    rest_seconds: float


class _HandsOn(torch.autograd.Function):
    """y = x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def call_cases(record: bool) -> dict[str, Case]:
    """Make the cases by name: the floor first, then ours, on tensors (1, 4, 1, 1)."""

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape).requires_grad_(record)

    x, net_out, matrix, offset = tensor(1, 4, 1, 1), tensor(1, 4, 1, 1), tensor(4, 4), tensor(4)
    spec = CouplingSpec("affine", "sigmoid")
    return {
        "torch.add": lambda: torch.add(x, net_out),
        "autograd.Function": lambda: _HandsOn.apply(x),
        "channel_mix": lambda: functional.channel_mix(x, matrix, offset),
        "coupling": lambda: functional.coupling(x, net_out, spec),
        "coupling_mix": lambda: functional.coupling_mix(x, net_out, matrix, offset, spec),
    }


def time_calls(cases: Mapping[str, Case], calls: int) -> dict[str, list[float]]:
    """Time so many calls of each case one by one, in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        for _ in range(WARM_UP_ROUNDS):
            case()
    while any(len(found) < calls for found in seconds.values()):
        for name, case in cases.items():
            for _ in range(min(BLOCK, calls - len(seconds[name]))):
                start = time.perf_counter()
                case()
                seconds[name].append(time.perf_counter() - start)
    return seconds


class _Recorder(TorchDispatchMode):
    """Notes the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "pyglow_fast":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


def step_cases(memory: str) -> tuple[Case, Case]:
    """A forward and backward of ``STEPS`` steps, and the kernels that run in it."""
    torch.manual_seed(0)
    # With one value in a channel the relative error may be anything: nothing is to be redone for it.
    steps = ReversibleSequence([FlowStep(CHANNELS, HIDDEN) for _ in range(STEPS)], memory=memory, tolerance=1.0)
    x = torch.randn(1, CHANNELS, 1, 1)
    steps.initialize(torch.randn(16, CHANNELS, 1, 1))
    params = list(steps.parameters())

    def run() -> None:
        z, log_det = steps(x)
        torch.autograd.grad(z.sum() + log_det.sum(), params)

    with _Recorder() as recorder:
        run()

    def kernels() -> None:
        with torch.no_grad():
            for op, args in recorder.calls:
                op(*args)

    return run, kernels


def measure(calls: int) -> tuple[list[CallRow], list[StepRow]]:
    """Measure all of it on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for record in (False, True):
            for name, seconds in time_calls(call_cases(record), calls).items():
                low, *_, high = statistics.quantiles(seconds, n=5)
                rows.append(CallRow(name, record, calls, statistics.median(seconds), low, high))
        steps = []
        for memory in ("store", "reversible"):
            run, kernels = step_cases(memory)
            few = max(2, calls // 10)
            found = time_calls({"run": run, "kernels": kernels}, few)
            step, alone = (statistics.median(found[name]) / STEPS for name in ("run", "kernels"))
            steps.append(StepRow(memory, few, step, alone, step - alone))
    finally:
        torch.set_num_threads(threads)
    return rows, steps


def table(rows: Sequence[CallRow], steps: Sequence[StepRow]) -> str:
    """Write a line for each case, in microseconds."""
    lines = [f"{'call':>20} {'no record, us':>14} {'with one, us':>13}"]
    for name in dict.fromkeys(row.case for row in rows):
        plain, recorded = (
            next(row.seconds for row in rows if (row.case, row.record) == (name, record)) for record in (False, True)
        )
        lines.append(f"{name:>20} {1e6 * plain:14.1f} {1e6 * recorded:13.1f}")
    lines.append(f"{'step':>20} {'in all, us':>14} {'kernels, us':>13} {'the rest, us':>13}")
    for step in steps:
        numbers = (1e6 * value for value in (step.seconds, step.kernel_seconds, step.rest_seconds))
        lines.append(f"{step.memory:>20} {next(numbers):14.0f} {next(numbers):13.0f} {next(numbers):13.0f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="calls", description="what a call costs", allow_abbrev=False)
    options.add_argument("--calls", type=int, default=2000, help="timed calls of each case (2000)")
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for calls-cpu.json")
    arguments = options.parse_args(argv)
    if arguments.calls < 2:
        options.error(f"--calls: expected 2 or more, found {arguments.calls}")
    rows, steps = measure(arguments.calls)
    print(table(rows, steps))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "calls-cpu.json", machine(CPU) | {"threads": "1"}, [*rows, *steps])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
