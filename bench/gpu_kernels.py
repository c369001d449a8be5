"""Times every op, and the flow step outside its net, on a GPU: in a CUDA graph, on buffers that rotate beyond the L2.

    python -m bench.gpu_kernels [--device cuda] [--shapes 8x12x64x64,...] [--only TEXT] [--out FILE]

A row has a case's microseconds, the bytes that it must move at least, and its share of a copy: the time of a copy of as
many bytes, measured in the same run in the same way, over the case's own. Beside it stand plain torch's time for the
same case and what was predicted from the compiled code, which is no measurement. Results are checked before they are
timed. The file is written after every shape. With ``--device cpu`` nothing is measured that means anything: it shows
that all of this runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.cases import SHAPES, Case, Data, check_equal, kernel_cases, parse_shapes, traffic
from bench.device_timing import Launch, RotatingTimer, copy_launches, device_of
from bench.gpu_model import predictions
from bench.harness import Timing, device_name, machine, write_json
from pyglow_fast import functional, reference


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """One case on one shape: seconds of ours, of a copy that touches as many bytes, and of plain torch's ops.

    ``copies`` sets of tensors took turns, so that ``copies * bytes`` is what a turn of all of them touches. None: it
    was not measured, and ``note`` says why; or nothing is predicted.
    """

    op: str
    mode: str
    shape: tuple[int, ...]
    device: str
    bytes: int
    copies: int
    seconds: float | None
    seconds_low: float | None
    seconds_high: float | None
    copy_seconds: float
    predicted_seconds: float | None
    plain_seconds: float | None
    note: str = ""
    implementation: str = "pyglow_fast"

    @classmethod
    def of(cls, values: dict[str, Any]) -> KernelRow:
        """Reads a row from JSON."""
        return cls(**values | {"shape": tuple(values["shape"])})

    @property
    def share_of_copy(self) -> float | None:
        """Says how near to a copy of as many bytes it comes."""
        return None if self.seconds is None else self.copy_seconds / self.seconds


class Kernels:
    """Times the cases of a device."""

    def __init__(self, device: torch.device, only: str = "") -> None:
        self.device, self.only = device, only
        self.timer = RotatingTimer(device_of(device))
        self.device_name = device_name(device)

    def rows(self, shape: tuple[int, ...]) -> list[KernelRow]:
        """All cases of one shape whose name contains ``only``."""
        with self.timer.device.stream():
            first = Data(shape, self.device)
            chosen = [case for case in kernel_cases(first) if self.only in case.name]
            least = min((traffic(case.op, case.mode, shape) for case in chosen), default=1)
            every = [first, *(first.copy() for _ in range(self.timer.copies(least) - 1))] if chosen else []
            turns: dict[str, list[Case]] = {case.name: [] for case in chosen}
            for data in every:
                for case in kernel_cases(data):
                    if case.name in turns:
                        turns[case.name].append(case)
        expected = {case: us / 1e6 for case, us in predictions(shape).items()}
        copied: dict[int, Timing] = {}
        rows = []
        for case in chosen:
            moved = traffic(case.op, case.mode, shape)
            number = min(self.timer.copies(moved), len(every))
            if moved not in copied:
                copied[moved] = self.timer.time(lambda m=moved, n=number: copy_launches(m, n, self.device))  # type: ignore[misc]
            found = self._case(turns[case.name][:number])
            rows.append(
                KernelRow(
                    op=case.op,
                    mode=case.mode,
                    shape=shape,
                    device=self.device_name,
                    bytes=moved,
                    copies=number,
                    copy_seconds=copied[moved].median,
                    predicted_seconds=expected.get((case.op, case.mode)),
                    **found,  # type: ignore[arg-type]
                )
            )
        return rows

    def _case(self, cases: Sequence[Case]) -> dict[str, float | str | None]:
        """The measured fields of a row."""
        found: dict[str, float | str | None] = dict.fromkeys(TIMES)
        notes = []
        try:
            with self.timer.device.stream():
                both = {name: cases[0].build(library, False)() for name, library in LIBRARIES.items()}
                check_equal(both, f"{cases[0].name} {cases[0].shape}")
                del both
            timing = self.timer.time(_launches(cases, functional))
            found |= {"seconds": timing.median, "seconds_low": timing.low, "seconds_high": timing.high}
        except RuntimeError as error:
            notes.append(_short(error))
        try:
            found["plain_seconds"] = self.timer.time(_launches(cases, reference)).median
        except RuntimeError as error:
            notes.append(f"plain torch: {_short(error)}")
        return found | {"note": "; ".join(notes)}


TIMES = ("seconds", "seconds_low", "seconds_high", "plain_seconds")
LIBRARIES = {"plain torch": reference, "ours": functional}


def _launches(cases: Sequence[Case], library: ModuleType) -> Callable[[], list[Launch]]:
    return lambda: [case.build(library, False) for case in cases]


def _short(error: RuntimeError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def table(rows: Sequence[KernelRow]) -> str:
    """A Markdown table of each shape, in microseconds."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(scale * value, form)

    def us(value: float | None) -> str:
        return number(value, ".2f", 1e6)

    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        lines += [f"{'x'.join(map(str, shape))}, {here[0].device}", ""]
        lines += [
            "| op | mode | us | low to high | MB | GB/s | copy us | share of copy | predicted us | plain us | note |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        for row in here:
            span = "-" if row.seconds_low is None else f"{us(row.seconds_low)} to {us(row.seconds_high)}"
            rate = None if row.seconds is None else row.bytes / row.seconds
            cells = [row.op, row.mode, us(row.seconds), span, f"{row.bytes / 1e6:.2f}", number(rate, ".0f", 1e-9)]
            cells += [us(row.copy_seconds), number(row.share_of_copy, ".2f"), us(row.predicted_seconds)]
            lines.append(f"| {' | '.join([*cells, us(row.plain_seconds), row.note])} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the file.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0; 1 if something could not be measured, or if there are no kernels for the device.
    """
    options = argparse.ArgumentParser(prog="bench gpu_kernels", description="kernels on a GPU", allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    options.add_argument(
        "--shapes", type=parse_shapes, default=SHAPES, help="separated by commas (those of bench kernels)"
    )
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = options.parse_args(argv)
    if not Case.is_ours(arguments.device):
        print(f"there are no compiled kernels for {arguments.device.type} here: nothing to time")
        return 1
    kernels, facts, rows = Kernels(arguments.device, arguments.only), machine(arguments.device), []
    gc.collect()
    gc.freeze()  # every capture collects garbage: what torch made at import would be looked through each time
    for shape in arguments.shapes:
        rows += kernels.rows(shape)
        print(table([row for row in rows if row.shape == shape]), flush=True)
        if arguments.out is not None:
            write_json(arguments.out, facts, rows)
    return 1 if any(row.note for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
