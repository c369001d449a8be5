"""The tables of docs/gpu.md: what is known of the CUDA kernels without a GPU, and their predicted times on one.

    python -m bench.gpu_tables [--write]

Without --write the tables are printed. With it the compiled kernels are counted anew (bench/gpu_counts.py: this needs
the tests' emulator, cuobjdump, and nvcc unless the module that was built is newer than the sources), and the counts go
to bench/results/gpu-model.json, the tables into the page. Where bench/results has kernels-cuda.json, which `bench
kernels --device cuda` writes and `bench gpu_check` as kernels.json, measured times stand beside the predicted ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import BETWEEN, SHAPES
from bench.gpu_kernels import KernelRow
from bench.gpu_model import (
    H100,
    L2_LATENCY,
    LIMITS,
    MEMORY_LATENCY,
    RESULT,
    Device,
    case_predictions,
    case_seconds,
    content,
    copy_seconds,
    resident,
)
from bench.harness import ROOT
from bench.memory_models import Shape
from bench.model_cases import CONFIGS, TRAIN, net_flops
from bench.scaling import number, table
from bench.scaling_model import states
from pyglow_fast._errors import expect

MEASURED = ROOT / "bench" / "results" / "kernels-cuda.json"
PAGE = ROOT / "docs" / "gpu.md"
NOT_MEASURED = "not measured"
# The Glow whose step is predicted, and what is assumed of the library's part in it: FLOP/s in float32, TF32 off, and
# kernels of a net's forward and backward.
GLOW, NET_RATE, NET_LAUNCHES = "a", 30e12, 16


def measured_seconds(path: Path = MEASURED) -> dict[tuple[str, str, tuple[int, ...]], float]:
    """Reads what each (op, mode, shape) took, from `bench kernels` or from that stage of `bench gpu_check`.

    Args:
        path: the file; nothing was measured while there is none.
    """
    if not path.is_file():
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    rows = map(KernelRow.of, (written.get("results") or written)["rows"])  # a stage's file has the benchmark's in it
    return {(row.op, row.mode, row.shape): row.seconds for row in rows if row.seconds is not None}


def case_table(
    shape: tuple[int, ...], counted: Mapping[str, Any], measured: Mapping[Any, float], device: Device = H100
) -> str:
    """A row for each op on one shape: launches, predicted us, share of the copy, the longest's limit, measured us."""
    rows = []
    for case in counted["cases"]:
        key = case["op"], case["mode"]
        if tuple(case["shape"]) != tuple(shape):
            continue
        launches = case_predictions(case, device)
        longest = max(launches, key=lambda launch: launch.seconds)
        seconds = sum(launch.seconds for launch in launches)
        took = measured.get((*key, tuple(shape)))
        rows.append(
            (
                ", ".join(key),
                " + ".join(number(1e6 * launch.seconds) for launch in launches),
                number(1e6 * seconds),
                f"{copy_seconds(*key, shape, device) / seconds:.2f}",
                f"{longest.kernel}, {longest.bound}",
                NOT_MEASURED if took is None else number(1e6 * took),
            )
        )
    head = ("op, mode", "launches, us", "predicted us", "share of the copy", "longest launch, its limit", "measured us")
    return table(head, rows)


def launch_table(counted: Mapping[str, Any], device: Device = H100) -> str:
    """A row for every launch of the ops on each shape: grid, work of a block, us by each limit, the largest in bold."""
    rows: dict[object, Sequence[object]] = {}
    for case in counted["cases"]:
        shape = tuple(case["shape"])
        if shape not in SHAPES:
            continue
        for prediction, launch in zip(case_predictions(case, device), case["launches"], strict=False):
            name = f"{launch['kernel']} of {case['op']}, {case['mode']}"
            threads = launch["threads"][0] * launch["threads"][1]
            work = round(launch["issued"]), f"{launch['round_trips']:g}"
            times = {limit: f"{1e6 * seconds:.2f}" for limit, seconds in prediction.limits.items()}
            times[prediction.bound] = f"**{times[prediction.bound]}**"
            row = name, shape, launch["blocks"], threads, resident(launch, device), *work, *times.values()
            rows.setdefault((shape, launch["kernel"], launch["arguments"], *row[2:7]), row)
    head = ("launch", "shape", "blocks", "threads", "resident", "instructions of a block", "round trips")
    return table((*head, *(f"{limit}, us" for limit in LIMITS)), rows.values())


def compiled_table(counted: Mapping[str, Any]) -> str:
    """A row for every compiled kernel: registers, blocks that these have room for, bytes spilled, 16-byte accesses."""
    compiled = counted["compiled"]
    launched = {launch["kernel"] for case in counted["cases"] for launch in case["launches"]}
    rows = []
    for kernel in sorted({name for kernels in compiled.values() for name in kernels}):
        found = [kernels[kernel] for kernels in compiled.values() if kernel in kernels]
        blocks = [H100.registers // (256 * -(-facts["registers"][1] // 8) * 8) for facts in found]
        rows.append(
            (
                kernel,
                f"{found[0]['instantiations']}, {found[0]['dtype']}",
                " / ".join(str(facts["registers"][1]) for facts in found),
                " / ".join(map(str, blocks)),
                max(facts["stack"] for facts in found),
                found[0]["static_bytes"],
                min(facts["wide"] for facts in found) or "none",
                "yes" if kernel in launched else "**not modelled: no case launches it**",
            )
        )
    archs = " / ".join(compiled)
    head = (
        "kernel",
        "instantiations",
        f"registers, {archs}",
        "blocks of 256 by registers",
        "bytes spilled",
        "static shared bytes",
        "16-byte accesses",
        "predicted below",
    )
    return table(head, rows)


def device_table(device: Device = H100) -> str:
    """What the predictions assume, and from where."""
    guide = "CUDA programming guide"
    results = "float32 128; integer, logic and float64 64; special functions and conversions 16"
    issue = f"{device.issue:.0f} instructions of a warp, of which slots {device.issue_share:.2f} are filled"
    l1 = f"{device.l1:.0f} bytes a cycle; blocks share {device.shared_bytes >> 10} KB"
    rows = [
        ("multiprocessors", f"{device.multiprocessors} at {device.clock / 1e9:.2f} GHz", "data sheet: 67 TFLOP/s"),
        ("memory", f"{device.bandwidth / 1e12:.2f} TB/s", "data sheet"),
        ("share of it that a copy reaches", f"{device.copy_share:.2f}", "assumed"),
        ("L2", f"{device.l2_bytes / 1e6:.0f} MB; {device.l2_bandwidth / 1e12:.1f} TB/s", "data sheet; assumed"),
        ("L2 to one multiprocessor", f"{device.l2_port:.0f} bytes a cycle", "assumed"),
        ("L1 and shared memory", l1, guide),
        ("issued in a cycle", issue, f"{guide}; assumed"),
        ("results in a cycle", results, f"{guide}; conversions assumed"),
        ("from load to value", f"from L2 {L2_LATENCY}, from memory {MEMORY_LATENCY} cycles", "assumed"),
        ("between dependent kernels in a graph", f"{device.gap * 1e6:.1f} us", "assumed"),
        ("a launch from Python", f"{device.eager_gap * 1e6:.0f} us of the host", "assumed"),
    ]
    return table(("what", "value", "source"), rows)


def glow_table(counted: Mapping[str, Any], device: Device = H100) -> str:
    """The parts of a Glow's training step (bench.model_cases, configuration a), stored, and their sum."""
    shape, ours, launches = CONFIGS[GLOW], 0.0, 0
    for level in level_shapes(shape):
        case = next(
            case
            for case in counted["cases"]
            if tuple(case["shape"]) == level and (case["op"], case["mode"]) == (BETWEEN, "forward+backward")
        )
        ours += shape.n_steps * case_seconds(case, device)
        launches += shape.n_steps * len(case_predictions(case, device))
    nets, steps = net_flops(shape, TRAIN) / NET_RATE, shape.n_steps * shape.n_levels
    net_launches = steps * NET_LAUNCHES
    rows = [
        (f"{steps} flow steps outside their nets", launches, number(1e6 * ours), "the rows of this model"),
        (
            f"{steps} coupling nets, forward and backward",
            net_launches,
            number(1e6 * (nets + net_launches * device.gap)),
            f"{NET_LAUNCHES} launches each, {number(NET_RATE / 1e12)} TFLOP/s: both assumed",
        ),
        (
            "sum, from a CUDA graph",
            launches + net_launches,
            number(1e6 * (ours + nets + net_launches * device.gap)),
            "without parameters, priors and the optimizer",
        ),
        (
            "launches alone, from Python",
            launches + net_launches,
            number(1e6 * (launches + net_launches) * device.eager_gap),
            "the least that an eager step takes",
        ),
    ]
    return table(("part", "launches", "predicted us", "how"), rows)


def level_shapes(shape: Shape) -> list[tuple[int, ...]]:
    """The flow's state in each level."""
    found = states(shape)
    return [(shape.batch, channels, math.isqrt(positions), math.isqrt(positions)) for channels, positions in found]


def sections(counted: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/gpu.md by the name in their markers."""
    measured = measured_seconds()
    return {
        "compiled": compiled_table(counted),
        "device": device_table(),
        **{"x".join(map(str, shape)): case_table(shape, counted, measured) for shape in SHAPES},
        "launches": launch_table(counted),
        "glow": glow_table(counted),
    }


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page with the tables between ``<!-- gpu_model: NAME -->`` and ``<!-- end -->``.

    Raises:
        ValueError: the page has no place for one of them.
    """
    for name, text in tables.items():
        begin, end = f"<!-- gpu_model: {name} -->\n", "<!-- end -->"
        expect(page.count(begin) == 1, "page", f"one place for the table {name!r}", page.count(begin))
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{text}\n\n{rest[rest.index(end) :]}"
    return page


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(
        prog="bench gpu_tables", description="predicted times on a GPU", allow_abbrev=False
    )
    options.add_argument(
        "--write",
        action="store_true",
        help="count anew from the compiled kernels, write bench/results/gpu-model.json and the tables of docs/gpu.md",
    )
    return options


def _json(counted: dict[str, Any]) -> str:
    """Writes each case on a line of its own."""
    cases = ",\n".join(f"  {json.dumps(entry)}" for entry in counted["cases"])
    return json.dumps(counted | {"cases": []}, indent=1).replace('"cases": []', f'"cases": [\n{cases}\n ]') + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, counted anew and written if asked.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0; 1 if the kernels cannot be counted.
    """
    arguments = parser().parse_args(argv)
    if arguments.write:
        from bench import gpu_counts  # needs the tests' emulator and the tools of the CUDA toolkit

        more = [case for shape in level_shapes(CONFIGS[GLOW]) for case in gpu_counts.glow_cases(shape)]
        try:
            counted = gpu_counts.content(more=more)
        except gpu_counts.CANNOT_COUNT as error:
            print(f"bench gpu_tables: nothing was written; {error}", file=sys.stderr)
            return 1
    else:
        counted = content()
    tables = sections(counted)
    for name, text in tables.items():
        print(f"{name}\n\n{text}\n")
    if arguments.write:
        page = with_tables(PAGE.read_text(encoding="utf-8"), tables)
        RESULT.write_text(_json(counted), encoding="utf-8")
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {RESULT} and the tables of {PAGE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
