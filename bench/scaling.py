"""What a training step costs as a function of the model, its batch and the number of GPUs: formulas against rows.

    pyglow-fast bench scaling [--rate FLOPS] [--bandwidth BYTES] [--memory GB] [--out DIR]
    pyglow-fast bench scaling --ranks [--threads T] [--batch N] [--rounds R] [--out DIR]

The formulas are in bench/scaling_model.py. Printed as Markdown: what they predict beside what was measured
(bench/results), and what the paper's larger models need. The latter is arithmetic with assumed rates, no measurement.
With --ranks, one process of T threads is measured beside T processes of one thread each (DistributedDataParallel with
gloo) on this CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import scaling_ranks
from bench.harness import ROOT, machine, write_json
from bench.memory_models import OURS, Shape
from bench.model_cases import CONFIGS, TRAIN
from bench.scaling_model import (
    FLOAT,
    all_reduced,
    flops,
    largest_batch,
    level_parameters,
    net_share,
    state_bytes,
    step_memory,
    step_time,
    traffic,
    training_bytes,
)

RESULTS = ROOT / "bench" / "results"
RANKS = (1, 8, 64)
RATE, BANDWIDTH = 10e12, 100e9  # assumed: sustained FLOP/s of a GPU, bytes/s that it sends in an all-reduce
MEMORY, RESERVE = 80.0, 4.0  # GB of a GPU, and of that for its context, the libraries' workspaces and fragmentation


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model of one image a GPU, how many images an epoch has, and a batch for each GPU."""

    shape: Shape
    images: int
    batch: int


# The paper's settings (Kingma & Dhariwal 2018, appendix) for the first two; its CelebA-HQ model has additive couplings,
# whose nets put out half as much.
PLANS = {
    "ImageNet 64": Plan(Shape((3, 64, 64), 4, 48, 512, 1), 1281149, 16),
    "CelebA-HQ 256": Plan(Shape((3, 256, 256), 6, 32, 512, 1), 30000, 4),
    "CelebA-HQ 1024": Plan(Shape((3, 1024, 1024), 7, 32, 512, 1), 30000, 1),
}
MEMORY_FILES = ("memory-cpu.json", "memory-resolution-cpu.json")  # of this build; the first file's rows count


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write rows as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _model(shape: Shape) -> str:
    return (
        f"{'x'.join(map(str, shape.image))}, L {shape.n_levels}, K {shape.n_steps}, h {shape.hidden}, N {shape.batch}"
    )


def memory_rows(contents: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """(model, mode, predicted, measured bytes) of all measured rows of ours but the shallow ones to continue from."""
    found: dict[tuple[Shape, str], tuple[str, str, float, float]] = {}
    for row in (row for content in contents for row in content["rows"]):
        shape, mode = Shape.of(row["shape"]), row["implementation"]
        if mode in OURS and not row["counted"] and shape.n_steps > 2:
            predicted = step_memory(shape, mode, "cpu", [level["anchor_every"] for level in row["report"]]).total
            found.setdefault((shape, mode), (_model(shape), mode, float(predicted), row["tensor_bytes_fresh"]))
    order = sorted(found, key=lambda key: (key[0].image, OURS.index(key[1]), key[0].n_steps))
    return [found[key] for key in order]


def memory_table(contents: Sequence[dict[str, Any]]) -> str:
    """Predicted and measured, MB."""
    rows = [
        (model, mode, number(predicted / 1e6), number(measured / 1e6), f"{measured / predicted:.2f}")
        for model, mode, predicted, measured in memory_rows(contents)
    ]
    return table(("model", "mode", "predicted MB", "measured MB", "measured / predicted"), rows)


def memory_contents() -> list[dict[str, Any]]:
    """The files of rows that are there."""
    return [_read(name) for name in MEMORY_FILES if (RESULTS / name).is_file()]


def time_rows(contents: Sequence[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """(configuration, mode, predicted, measured seconds) of a training step, each mode at its fastest."""
    fastest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in (row for content in contents for row in content["rows"]):
        key = row["config"], row["implementation"]
        if row["workload"] == TRAIN and key[1] in OURS:
            fastest[key] = min(row, fastest.get(key, row), key=lambda found: found["seconds"])
    found = []
    for (config, mode), row in sorted(fastest.items()):
        predicted = flops(Shape.of(row["shape"]), mode) / (1e9 * row["product_gigaflops"])
        found.append((config, mode, predicted, row["seconds"]))
    return found


def time_table(contents: Sequence[dict[str, Any]]) -> str:
    """Predicted and measured, ms."""
    rows = [
        (
            f"({config}) {_model(CONFIGS[config])}",
            mode,
            f"{100 * net_share(CONFIGS[config]):.1f} %",
            number(1e3 * predicted),
            number(1e3 * measured),
            f"{measured / predicted:.2f}",
        )
        for config, mode, predicted, measured in time_rows(contents)
    ]
    head = ("model", "mode", "of it nets", "at the product rate, ms", "measured ms", "measured / predicted")
    return table(head, rows)


def size_table() -> str:
    """Write a table of each plan's parameters, state, arithmetic and traffic of one image."""
    rows = []
    for name, plan in PLANS.items():
        per_image = [flops(plan.shape, mode, "cuda") for mode in ("store", "reversible")]
        rows.append(
            (
                f"{name}: {_model(plan.shape)}",
                number(sum(level_parameters(plan.shape)) / 1e6),
                number(sum(state_bytes(plan.shape)) / 1e6),
                *(number(value / 1e12) for value in per_image),
                *(number(value * plan.images / 1e18) for value in per_image),
                number(traffic(plan.shape, "reversible") / 1e9),
            )
        )
    head = (
        "model",
        "M parameters",
        "states of all levels, MB/image",
        "TFLOP/image, store",
        "reversible",
        "EFLOP/epoch, store",
        "reversible",
        "state traffic, GB/image, reversible",
    )
    return table(head, rows)


def fit_table(memory: float) -> str:
    """The largest batch of a GPU, by mode, on one GPU and on several."""
    limit = int((memory - RESERVE) * 1e9)
    rows = []
    for name, plan in PLANS.items():
        for mode in OURS:
            single = training_bytes(plan.shape, mode, 1)
            batches = [largest_batch(plan.shape, mode, ranks, limit) for ranks in (1, RANKS[-1])]
            rows.append((name, mode, number(single / 1e9), *(batch or "none" for batch in batches)))
    head = ("model", "mode", "GB with one image", f"images in {memory:g} GB, one GPU", "of several, each")
    return table(head, rows)


def run_table(rate: float, bandwidth: float, mode: str = "reversible") -> str:
    """Write a table for 1, 8 and 64 GPUs with the plan's batch each: memory, all-reduce, times by assumed rates."""
    rows = []
    for name, plan in PLANS.items():
        shape = dataclasses.replace(plan.shape, batch=plan.batch)
        gradients = FLOAT * sum(level_parameters(shape))
        for ranks in RANKS:
            times = step_time(shape, mode, ranks, rate, bandwidth)
            steps = plan.images / (plan.batch * ranks)
            rows.append(
                (
                    name,
                    ranks,
                    plan.batch * ranks,
                    number(training_bytes(shape, mode, ranks) / 1e9),
                    number(flops(shape, mode, "cuda") / 1e12),
                    number(all_reduced(gradients, ranks) / 1e6),
                    number(times.compute),
                    number(1e3 * times.all_reduce),
                    number(1e3 * times.exposed),
                    number(steps * times.total / 3600),
                )
            )
    head = (
        "model",
        "GPUs",
        "images/step",
        "GB/GPU",
        "TFLOP/GPU and step",
        "all-reduce, MB sent/GPU and step",
        "compute, s",
        "all-reduce, ms",
        "not hidden, ms",
        "h/epoch",
    )
    return table(head, rows)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def sections(rate: float = RATE, bandwidth: float = BANDWIDTH, memory: float = MEMORY) -> dict[str, str]:
    """Title and table of all that is printed without --ranks."""
    times = [_read(f"models-cpu-{malloc}-malloc.json") for malloc in ("default", "tuned")]
    assumed = f"assumed: {number(rate / 1e12)} TFLOP/s sustained, {number(bandwidth / 1e9)} GB/s; arithmetic"
    return {
        "Memory of a step, predicted and measured (CPU)": memory_table(memory_contents()),
        "Time of a step, predicted and measured (CPU)": time_table(times),
        "Sizes (arithmetic)": size_table(),
        "Memory of a GPU (arithmetic)": fit_table(memory),
        f"Runs in mode reversible ({assumed})": run_table(rate, bandwidth),
    }


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(prog="bench scaling", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--rate", type=float, default=RATE, help="assumed FLOP/s of a GPU")
    options.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="assumed bytes/s of a GPU in an all-reduce")
    options.add_argument("--memory", type=float, default=MEMORY, metavar="GB", help="of a GPU")
    options.add_argument("--ranks", action="store_true", help="measure processes against threads, on this CPU")
    options.add_argument("--threads", type=int, default=2, help="of --ranks, in all")
    options.add_argument("--configs", default="a,b", help="of --ranks, separated by commas: see bench models")
    options.add_argument("--batch", type=int, help="of --ranks, of all processes together, in place of the standard")
    options.add_argument("--memory-mode", choices=OURS, default="reversible", help="of --ranks")
    options.add_argument("--rounds", type=int, default=5, help="of --ranks: times that each case is started, in turn")
    options.add_argument(
        "--timed-steps", type=int, default=4, help="of --ranks: training steps of each start that are timed"
    )
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for scaling.md or scaling-ranks-cpu.json")
    found = options.parse_args(argv)
    unknown = set(found.configs.split(",")) - set(CONFIGS)
    if unknown:
        options.error(f"--configs: expected some of {','.join(CONFIGS)}, found {found.configs}")
    for name in ("rate", "bandwidth", "threads", "rounds", "timed_steps"):
        if getattr(found, name) <= 0:
            options.error(f"--{name.replace('_', '-')}: expected a positive number, found {getattr(found, name):g}")
    if found.memory <= RESERVE:
        options.error(f"--memory: expected more than {RESERVE:g} GB, found {found.memory:g}")
    return found


def _measure_ranks(options: argparse.Namespace) -> None:
    rows: list[scaling_ranks.RanksRow] = []
    for name in options.configs.split(","):
        shape = CONFIGS[name] if options.batch is None else dataclasses.replace(CONFIGS[name], batch=options.batch)
        rows += scaling_ranks.measure(
            name, shape, options.memory_mode, options.threads, options.rounds, options.timed_steps
        )
    print(scaling_ranks.table(rows))
    if options.out is not None:
        facts = machine(torch.device("cpu")) | {"threads": str(options.threads), "rounds": str(options.rounds)}
        write_json(options.out / "scaling-ranks-cpu.json", facts, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or measure processes.

    Args:
        argv: the options; those of the process if None.
    """
    options = _options(argv)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.ranks:
        _measure_ranks(options)
        return 0
    parts = sections(options.rate, options.bandwidth, options.memory)
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in parts.items()) + "\n"
    print(text)
    if options.out is not None:
        (options.out / "scaling.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
