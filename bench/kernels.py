"""Every op, and the flow step outside its coupling net: ours, the reference eager and compiled, and the peers' layers.

    python -m bench.kernels [--device cpu] [--compile] [--peers] [--quick] [--out DIR]

On a GPU bench/gpu_kernels.py measures, without peers and torch.compile, which bench models has there.

On the CPU everything is measured twice, in processes with two settings of malloc: the default, and one that keeps large
buffers (bench.harness.TUNED_MALLOC), under which fresh ones cost no page faults. Each row says what the operation must
move and compute at least, and which fraction it reaches of two ceilings of the same run: a copy that touches as many
bytes, and the library's matrix product.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_kernels, peers, roofline
from bench.cases import (
    BETWEEN,
    SHAPES,
    SPEC,
    STEP,
    Case,
    Data,
    Run,
    arithmetic,
    check_equal,
    op_cases,
    step_cases,
    traffic,
)
from bench.harness import (
    Row,
    Timing,
    copy_case,
    device_name,
    interleave,
    machine,
    malloc_environments,
    malloc_setting,
    product_peak,
    run_module,
    write_json,
)
from pyglow_fast import functional, reference

OURS, PLAIN, COMPILED = "pyglow_fast", "reference", "reference compiled"
QUICK_SHAPES, QUICK_ROUNDS = [(4, 12, 32, 32), (1, 12, 128, 128)], 5


def ours_as(peer: str) -> str:
    """The name of our kernels with the scale map and order of a peer's coupling."""
    return f"{OURS} as {peer}"


class Measurement:
    """One device, one process: what is measured, and how."""

    def __init__(self, device: torch.device, rounds: int, compiled: bool, with_peers: bool, only: str) -> None:
        self.device, self.rounds, self.compiled, self.with_peers, self.only = device, rounds, compiled, with_peers, only
        self.device_name, self.malloc = device_name(device), malloc_setting()
        self.peak = product_peak(device)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Print a remark and keep it for the JSON, once."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", flush=True)

    def shape(self, shape: tuple[int, ...]) -> list[Row]:
        """All cases of one shape."""
        if self.compiled:
            torch.compiler.reset()  # else the shapes before this one exhaust the number of recompilations
        data, rows = Data(shape, self.device), []
        found, missing = peers.available(data) if self.with_peers else ([], [])
        for line in missing:
            self.note(line)
        for peer in found:
            peers.check(peer, data)
        for case in self._wanted(op_cases(data)):
            rows += self._case(case, {})
        like = {peer.name: step_cases(data, peer.spec) for peer in found if peer.spec != SPEC}
        for index, case in enumerate(step_cases(data)):
            others = {peer.name: peers.run_of(peer, data, case.op, case.mode) for peer in found}
            if case.is_ours(self.device):
                others |= {ours_as(name): cases[index].build(functional, False) for name, cases in like.items()}
            if self._wanted([case]):
                rows += self._case(case, others)
        return rows

    def _wanted(self, cases: list[Case]) -> list[Case]:
        return [case for case in cases if self.only in case.name]

    def _case(self, case: Case, others: dict[str, Run]) -> list[Row]:
        runs = {PLAIN: case.build(reference, False)}
        if case.is_ours(self.device):
            runs = {OURS: case.build(functional, False)} | runs
        else:
            self.note(f"{case.name}: no kernel for {self.device.type}, the reference alone is measured")
        if self.compiled and case.compiles:
            runs[COMPILED] = case.build(reference, True)
        check_equal({name: run() for name, run in runs.items()}, f"{case.name} {case.shape}")
        moved, computed = traffic(case.op, case.mode, case.shape), arithmetic(case.op, case.mode, case.shape)
        timings = interleave({"copy": copy_case(moved, self.device), **runs, **others}, self.device, self.rounds)
        copy_rate = moved / timings.pop("copy").median
        return [self._row(case, name, timing, moved, computed, copy_rate) for name, timing in timings.items()]

    def _row(self, case: Case, name: str, timing: Timing, moved: int, computed: int, copy_rate: float) -> Row:
        rate, flop_rate = moved / timing.median, computed / timing.median
        return Row(
            op=case.op,
            implementation=name,
            mode=case.mode,
            shape=case.shape,
            dtype="float32",
            device=self.device_name,
            malloc=self.malloc,
            seconds=timing.median,
            seconds_low=timing.low,
            seconds_high=timing.high,
            bytes=moved,
            gigabytes_per_second=rate / 1e9,
            copy_gigabytes_per_second=copy_rate / 1e9,
            fraction_of_copy=rate / copy_rate,
            flops=computed,
            gigaflops=flop_rate / 1e9,
            peak_gigaflops=self.peak / 1e9,
            fraction_of_peak=flop_rate / self.peak,
        )


def limit(row: Row) -> str:
    """Which ceiling a row is within a factor of three of: that of memory, else that of arithmetic, else neither."""
    if row.fraction_of_copy >= 1 / 3:
        return "memory"
    return "arithmetic" if row.fraction_of_peak >= 1 / 3 else "neither"


def table(rows: Sequence[Row]) -> str:
    """Write, by shape, a line for each op and mode: ours, its fractions of the ceilings, how much slower others are."""
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        lines.append(f"{shape}, malloc {here[0].malloc}, matrix product {here[0].peak_gigaflops:.0f} GFLOP/s")
        lines.append(f"  {'':44} {'ms':>9} {'GB/s':>7} {'/copy':>6} {'GFLOP/s':>8} {'/peak':>6}  limit; others / ours")
        for op, mode in dict.fromkeys((row.op, row.mode) for row in here):
            group = {row.implementation: row for row in here if (row.op, row.mode) == (op, mode)}
            row = group.get(OURS) or group[PLAIN]
            ratios = [
                f"{name} {other.seconds / group.get(ours_as(name), row).seconds:.2f}"
                for name, other in group.items()
                if other is not row and not name.startswith(OURS)
            ]
            lines.append(
                f"  {f'{op}, {mode}' + ('' if row.implementation == OURS else ' (reference)'):<44}"
                f" {1e3 * row.seconds:9.3f} {row.gigabytes_per_second:7.1f} {row.fraction_of_copy:6.2f}"
                f" {row.gigaflops:8.1f} {row.fraction_of_peak:6.2f}  {limit(row)}; {', '.join(ratios)}"
            )
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """How much slower than ours the others are, the flow step outside its net, by shape and malloc setting."""
    lines = ["others / ours, by malloc setting"]
    for op, mode in ((STEP, "forward"), (STEP, "inverse"), (STEP, "forward+backward"), (BETWEEN, "forward+backward")):
        for shape in dict.fromkeys(row.shape for row in rows):
            cells = []
            for malloc in dict.fromkeys(row.malloc for row in rows):
                key = (op, mode, shape, malloc)
                group = {r.implementation: r for r in rows if (r.op, r.mode, r.shape, r.malloc) == key}
                if OURS in group:
                    ratios = [
                        f"{name} {row.seconds / group.get(ours_as(name), group[OURS]).seconds:.2f}"
                        for name, row in group.items()
                        if not name.startswith(OURS)
                    ]
                    cells.append(f"{malloc}: {', '.join(ratios)}")
            if cells:
                lines.append(f"  {f'{op}, {mode}':<46} {shape!s:<20} {' | '.join(cells)}")
    return "\n".join(lines)


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row], list[str]]:
    """Machine, rows and notes of a file that this benchmark wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**(row | {"shape": tuple(row["shape"])})) for row in content["rows"]]
    return content["machine"], rows, content["notes"]


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(
        prog="bench kernels", description="the ops and the flow step outside its net", allow_abbrev=False
    )
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for kernels-DEVICE.json and a roofline plot")
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    options.add_argument("--rounds", type=int, help="interleaved rounds (21; quick: 5)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    options.add_argument("--compile", action="store_true", help="also the reference under torch.compile")
    options.add_argument("--peers", action="store_true", help="also the layers of normflows, nflows and FrEIA")
    options.add_argument("--quick", action="store_true", help="two small shapes, few rounds: to see that it works")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    options.add_argument(
        "--malloc",
        choices=["both", "default", "tuned", "here"],
        default="both",
        help="on the CPU: processes with both settings (default) or one of them; here: this process as it is",
    )
    return options


def _file(arguments: argparse.Namespace, folder: Path) -> Path:
    return folder / f"kernels-{arguments.device.type}.json"


def _write(arguments: argparse.Namespace, facts: dict[str, Any], rows: list[Row], notes: list[str]) -> None:
    if arguments.out is None:
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = _file(arguments, arguments.out)
    write_json(path, facts, rows, notes=notes)
    print(f"wrote {path}")
    if arguments.malloc != "here":
        print(roofline.write(rows, path.with_name(f"{path.stem}-roofline.png")))


def _measure_here(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else 21)
    facts = machine(arguments.device) | {"rounds": str(rounds)} | (peers.versions() if arguments.peers else {})
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    measurement = Measurement(arguments.device, rounds, arguments.compile, arguments.peers, arguments.only)
    rows = []
    for shape in QUICK_SHAPES if arguments.quick else SHAPES:
        measured = measurement.shape(shape)
        print(table(measured), flush=True)
        rows += measured
    _write(arguments, facts, rows, measurement.notes)
    return 0


def _again(arguments: argparse.Namespace) -> list[str]:
    """The options again, as they are given to a measuring process."""
    given = ["--device", str(arguments.device), "--threads", str(arguments.threads), "--only", arguments.only]
    given += [] if arguments.rounds is None else ["--rounds", str(arguments.rounds)]
    return given + [f"--{name}" for name in ("compile", "peers", "quick") if getattr(arguments, name)]


def _measure_both(arguments: argparse.Namespace) -> int:
    """Each malloc setting in a process of its own; one table, one file."""
    environments = malloc_environments()
    wanted = list(environments) if arguments.malloc == "both" else [arguments.malloc]
    facts: dict[str, Any] = {}
    rows: list[Row] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for malloc in wanted:
            out = Path(folder, malloc)
            code = run_module(
                "bench.kernels", [*_again(arguments), "--malloc", "here", "--out", str(out)], environments[malloc]
            )
            if code:
                return code
            facts, measured, remarks = read_rows(_file(arguments, out))
            rows += measured
            notes += [remark for remark in remarks if remark not in notes]
    print(summary(rows))
    _write(arguments, facts | {"malloc": " and ".join(wanted)}, rows, notes)
    return 0


def _on_gpu(arguments: argparse.Namespace) -> int:
    shapes = ",".join("x".join(map(str, shape)) for shape in (QUICK_SHAPES if arguments.quick else SHAPES))
    given = ["--device", str(arguments.device), "--shapes", shapes, "--only", arguments.only]
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        given += ["--out", str(_file(arguments, arguments.out))]
    return gpu_kernels.main(given)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the files.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0, or the exit code of a measuring process that failed.
    """
    options = parser()
    arguments = options.parse_args(argv)
    if arguments.device.type == "cuda":
        if arguments.compile or arguments.peers:
            options.error("--compile, --peers: expected on the CPU; on a GPU bench models has them")
        return _on_gpu(arguments)
    return _measure_both(arguments) if arguments.malloc != "here" else _measure_here(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
