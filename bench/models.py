"""Whole models: a training step, log_prob and sampling, by ours, plain torch and the peers' layers.

    python -m bench.models [--configs a,b] [--precision fp32] [--device cpu] [--compile [NAMES]] [--quick] [--out DIR]

A training step is zero_grad, forward and backward of the mean of -log_prob; an optimizer is no part of it. log_prob and
sample run under no_grad in evaluation mode. Every candidate is checked before it is timed (bench/model_checks.py);
then all take turns in one process, in an order that changes from round to round, the library's matrix products at the
nets' shapes among them. On the CPU each configuration is measured twice, in fresh processes with two settings of malloc
(bench.harness.TUNED_MALLOC): what ran before leaves the heap and the memory's pages in a state that slows what comes
after. Ratios are of each side at its own best over variants and both settings.

With ``--precision bf16`` our models have that precision and the others run under torch.autocast; ours (stored and
reversible) and the peers' layers are in the same rounds in float32, too, so that all ratios come from one run. On a
GPU torch lets convolutions round to TF32: ``--precision fp32`` turns that off, ``tf32`` on, and the rows say which.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import model_plots, peers
from bench.harness import (
    device_name,
    machine,
    malloc_environments,
    malloc_setting,
    run_module,
    synchronize,
    write_json,
)
from bench.memory_models import Shape
from bench.model_cases import (
    CONFIGS,
    IMPLEMENTATIONS,
    TRAIN,
    WITHOUT_GRADIENTS,
    WORKLOADS,
    Candidate,
    Candidates,
    net_flops,
    products_case,
    reset_compiler,
)
from bench.model_checks import Checks, Errors, passing
from bench.model_rows import ModelRow, table, verdicts
from bench.precisions import PRECISIONS, TF32, tf32

PRODUCTS = "library's products"
TURN_SECONDS = 0.1  # short cases are repeated within their turn to about this
LEAST_ROUNDS = 3


def take_turns(
    cases: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of a call of each case in each round; fewer rounds, but LEAST_ROUNDS, once the time is spent.

    The cases have run before; one more call here is not counted, and neither is the first of a repeated turn: it finds
    the caches and the heap as another left them.
    """
    begin = time.perf_counter()

    def timed(case: Callable[[], object], times: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            case()
        synchronize(device)
        return (time.perf_counter() - start) / times

    repeats = {name: max(1, min(1000, int(TURN_SECONDS / max(timed(case, 1), 1e-7)))) for name, case in cases.items()}
    found: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(rounds):
        if done >= min(LEAST_ROUNDS, rounds) and time.perf_counter() - begin > seconds:
            break
        for name in random.Random(done).sample(list(cases), len(cases)):
            if repeats[name] > 1:
                cases[name]()
            found[name].append(timed(cases[name], repeats[name]))
    return found


class Measurement:
    """One process: its device and malloc setting, and how much of what is measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.rounds, self.seconds = arguments.device, arguments.rounds, arguments.seconds
        self.names, self.workloads, self.compiled = arguments.implementations, arguments.workloads, arguments.compile
        self.tf32 = arguments.precision == TF32
        self.dtype = torch.float32 if self.tf32 else PRECISIONS[arguments.precision]
        self.shapes: dict[str, Shape] = arguments.shapes or CONFIGS
        if arguments.quick:
            self.shapes = {name: quick(shape) for name, shape in self.shapes.items()}
        self.device_name, self.malloc = device_name(self.device), malloc_setting()
        self.notes: list[str] = []

    def config(self, config: str) -> list[ModelRow]:
        """All workloads of one configuration; prints a table of each."""
        shape, rows = self.shapes[config], []
        candidates = Candidates(shape, self.device, self.names, self.compiled, self.dtype, self.tf32)
        for line in candidates.missing:
            self._note(line)
        for workload in self.workloads:
            if self.compiled:
                reset_compiler()  # what was compiled before would be looked through at every call
            for candidate in candidates.found:
                candidate.model.train(workload == TRAIN)
            checks = Checks(candidates, workload)
            found, lines = passing(checks, candidates.of(workload))
            errors = checks.errors
            del checks  # what it holds in float64 is as much as the models
            for line in lines:
                self._note(f"({config}) {line}")
            measured = self._workload(config, shape, workload, found, errors)
            print(table(measured), flush=True)
            rows += measured
            for candidate in candidates.found:
                candidate.model.zero_grad(set_to_none=True)
        return rows

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
            print(f"note: {line}", flush=True)

    def _workload(
        self, config: str, shape: Shape, workload: str, candidates: Sequence[Candidate], errors: Mapping[str, Errors]
    ) -> list[ModelRow]:
        dtypes = list(dict.fromkeys(candidate.dtype for candidate in candidates))
        products = {dtype: products_case(shape, self.device, dtype, self.tf32) for dtype in dtypes}
        cases: dict[str, Callable[[], object]] = {f"{PRODUCTS}, {dtype}": products[dtype][0] for dtype in dtypes}
        cases |= {candidate.name: candidate.run(workload) for candidate in candidates}
        times = take_turns(cases, self.device, self.rounds, self.seconds / len(self.workloads))
        rates = {dtype: products[dtype][1] / statistics.median(times[f"{PRODUCTS}, {dtype}"]) for dtype in dtypes}
        flops = net_flops(shape, workload)
        rows = []
        for candidate in candidates:
            values, product_rate, error = times[candidate.name], rates[candidate.dtype], errors[candidate.name]
            low, median, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else 3 * values
            rows.append(
                ModelRow(
                    config=config,
                    workload=workload,
                    implementation=candidate.implementation,
                    variant=candidate.variant,
                    malloc=self.malloc,
                    device=self.device_name,
                    dtype=candidate.dtype_name,
                    shape=shape,
                    seconds=median,
                    seconds_low=low,
                    seconds_high=high,
                    rounds=len(values),
                    flops=flops,
                    gigaflops=flops / median / 1e9,
                    product_gigaflops=product_rate / 1e9,
                    fraction_of_products=flops / median / product_rate,
                    note=_note_of(candidate, workload),
                    gradient_error=error.gradients,
                    gradient_error_worst=error.worst_gradient,
                    value_error=error.values,
                )
            )
        return rows


def _note_of(candidate: Candidate, workload: str) -> str:
    if candidate.memory is None:
        return candidate.note
    if workload != TRAIN:
        return WITHOUT_GRADIENTS
    if candidate.memory != "reversible":
        return ""
    reports = candidate.model.memory_report()
    return (
        f"anchors every {[r['anchor_every'] for r in reports]} steps, {sum(r['redone_steps'] for r in reports)} redone"
    )


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser's type: a list of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found {text!r}")
        return names

    return parse


def quick(shape: Shape) -> Shape:
    """Shrink a configuration to few steps, narrow nets and one or two small images: to see that all of it runs."""
    side = min(shape.image[1], 2 ** (shape.n_levels + 1))
    image = (shape.image[0], *[side] * (len(shape.image) - 1))
    return dataclasses.replace(shape, image=image, n_steps=min(shape.n_steps, 2), hidden=8, batch=min(shape.batch, 2))


def _shapes(text: str) -> dict[str, Shape]:
    return {name: Shape.of(values) for name, values in json.loads(text).items()}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(prog="models", description="whole models against peers", allow_abbrev=False)
    options.add_argument("--configs", type=chosen(list(CONFIGS)), default=list(CONFIGS), help="some of a,b,c,d,e")
    options.add_argument("--workloads", type=chosen(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS))
    options.add_argument(
        "--implementations",
        type=chosen(IMPLEMENTATIONS),
        default=list(IMPLEMENTATIONS),
        help=", ".join(IMPLEMENTATIONS),
    )
    options.add_argument(
        "--precision",
        choices=[*PRECISIONS, TF32],
        default="fp32",
        help="fp32 (default); bf16: with float32 beside it; tf32: convolutions may round to it, on a GPU",
    )
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    options.add_argument("--rounds", type=int, default=5, help="interleaved rounds (5)")
    options.add_argument(
        "--seconds", type=float, default=900.0, help=f"of a configuration; past them {LEAST_ROUNDS} rounds do (900)"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    options.add_argument(
        "--compile",
        nargs="?",
        type=chosen(IMPLEMENTATIONS),
        const=list(IMPLEMENTATIONS),
        default=[],
        metavar="NAMES",
        help="also under torch.compile, minutes each for deep models: all, or those named",
    )
    options.add_argument("--quick", action="store_true", help="tiny models and images: to see that it works")
    options.add_argument(
        "--shapes", type=_shapes, help=argparse.SUPPRESS
    )  # of the configurations, for a process of ours
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for the results and a plot")
    options.add_argument(
        "--malloc",
        choices=["both", "default", "tuned", "here"],
        default="both",
        help="on the CPU: processes with both settings (default) or one of them; here: this process as it is",
    )
    return options


def _stem(arguments: argparse.Namespace) -> str:
    return f"models-{arguments.device.type}" + ("" if arguments.precision == "fp32" else f"-{arguments.precision}")


def _file(arguments: argparse.Namespace, malloc: str) -> str:
    setting = f"-{malloc}-malloc" if arguments.device.type == "cpu" and malloc in ("default", "tuned") else ""
    return f"{_stem(arguments)}{setting}.json"


def _write(
    arguments: argparse.Namespace,
    malloc: str,
    facts: Mapping[str, object],
    rows: Sequence[ModelRow],
    notes: Sequence[str],
) -> None:
    """Write the file, after each configuration, so that a run that is stopped leaves what it has."""
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / _file(arguments, malloc), facts, rows, notes=notes)


def _measure_here(arguments: argparse.Namespace) -> list[ModelRow]:
    torch.set_num_threads(arguments.threads)
    measurement = Measurement(arguments)
    facts = machine(arguments.device) | {"rounds": str(arguments.rounds)} | peers.versions()
    facts["precision"] = arguments.precision
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    rows: list[ModelRow] = []
    with tf32(measurement.tf32):
        for config in arguments.configs:
            rows += measurement.config(config)
            _write(arguments, measurement.malloc, facts, rows, measurement.notes)
    return rows


def _again(arguments: argparse.Namespace, config: str) -> list[str]:
    """The options again, as they are given to the process that measures a configuration."""
    given = ["--device", str(arguments.device), "--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    given += ["--precision", arguments.precision, "--seconds", str(arguments.seconds)]
    given += ["--compile", ",".join(arguments.compile)] if arguments.compile else []
    given += ["--quick"] if arguments.quick else []
    given += ["--shapes", json.dumps({config: dataclasses.asdict(CONFIGS[config])}), "--configs", config]
    for name in ("workloads", "implementations"):
        given += [f"--{name}", ",".join(getattr(arguments, name))]
    return given


def _measure_in_processes(arguments: argparse.Namespace) -> tuple[int, list[ModelRow]]:
    """Each configuration and malloc setting in a process of its own; one file for all of a setting."""
    environments = malloc_environments()
    found: dict[str, list[ModelRow]] = {}
    notes: dict[str, list[str]] = {}
    settings = list(environments) if arguments.malloc == "both" else [arguments.malloc]
    for config, malloc in [(config, malloc) for config in arguments.configs for malloc in settings]:
        rows, lines = found.setdefault(malloc, []), notes.setdefault(malloc, [])
        with tempfile.TemporaryDirectory() as folder:
            options = [*_again(arguments, config), "--malloc", "here", "--out", folder]
            code = run_module("bench.models", options, environments[malloc])
            if code:
                return code, []
            path = Path(folder) / _file(arguments, malloc)
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows += [ModelRow.of(row) for row in content["rows"]]
        lines += [line for line in content["notes"] if line not in lines]
        _write(arguments, malloc, content["machine"], rows, lines)
    return 0, [row for rows in found.values() for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and the bars, write the files.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0, or the exit code of a measuring process that failed.
    """
    arguments = parser().parse_args(argv)
    if arguments.malloc == "here":
        _measure_here(arguments)
        return 0
    if arguments.device.type == "cpu":
        code, rows = _measure_in_processes(arguments)
        if code:
            return code
    else:
        rows = _measure_here(arguments)
    print("ours against the others, each side at its best over variants and malloc settings")
    print("\n".join(verdicts(rows)))
    print("memory is not measured here: pyglow-fast bench memory")
    if arguments.out is not None:
        print(f"results in {arguments.out}")
        print(model_plots.draw(rows, arguments.out / f"{_stem(arguments)}.png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
