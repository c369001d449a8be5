"""Coupling nets alone: our matrix products against the library's convolutions, at the shapes of the model benchmark.

    python -m bench.nets [--configs a,b] [--rounds 7] [--out DIR]

Every level of a configuration has a net of its own shape. Forward is without a record; forward+backward gives all
gradients. The library runs the reference's three convolutions, contiguous and channels_last. All take turns, in
processes with two settings of malloc. The table says which of them ``functional.net_as_products`` should take; what it
takes on the CPU is products, everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import check_equal
from bench.harness import device_name, machine, malloc_environments, malloc_setting, run_module, write_json
from bench.memory_models import Shape
from bench.model_cases import CONFIGS
from bench.models import chosen, take_turns
from pyglow_fast import functional, reference

OURS, LIBRARY, CHANNELS_LAST = "products", "library", "library, channels_last"
FORWARD, BOTH = "forward", "forward+backward"
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class NetRow:
    """A timed net: images (N, C/2, H, W) -> hidden -> hidden -> (N, C, H, W); ``flops`` of the convolutions."""

    config: str
    level: int
    implementation: str
    mode: str
    malloc: str
    device: str
    batch: int
    channels: int
    hidden: int
    height: int
    width: int
    seconds: float
    flops: int
    gigaflops: float


def net_shapes(shape: Shape) -> list[tuple[int, int, int, int, int]]:
    """(N, C, hidden, H, W) by level."""
    channels, height, width = shape.image
    found = []
    for _ in range(shape.n_levels):
        if shape.squeezes:
            channels, height, width = 4 * channels, height // 2, width // 2
        found.append((shape.batch, channels, shape.hidden, height, width))
        channels = channels // 2 if shape.squeezes else channels
    return found


def net_cases(shape: tuple[int, int, int, int, int], mode: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """By implementation, what is timed; their results are compared first."""
    n, channels, hidden, height, width = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int, fan_in: int = 1) -> Tensor:
        return torch.randn(sizes, generator=generator) / fan_in**0.5

    inside = channels // 2
    weights = [
        random(hidden, inside, 3, 3, fan_in=9 * inside),
        random(hidden),
        random(hidden, hidden, 1, 1, fan_in=hidden),
        random(hidden),
        random(channels, hidden, 3, 3, fan_in=9 * hidden),
        random(channels),
        0.1 * random(channels, 1, 1),
    ]
    x, grad = random(n, inside, height, width), random(n, channels, height, width)

    def case(function: Callable[..., Tensor], last: bool) -> Callable[[], tuple[Tensor, ...]]:
        layout = torch.channels_last if last else torch.contiguous_format
        given = [value.to(memory_format=layout) if value.dim() == 4 else value for value in (x, *weights)]
        if mode == FORWARD:
            return lambda: (_without_record(function, given),)
        leaves = [value.clone(memory_format=torch.preserve_format).requires_grad_() for value in given]
        out_grad = grad.to(memory_format=layout)
        return lambda: torch.autograd.grad(function(*leaves), leaves, out_grad)

    found = {
        OURS: case(functional.coupling_net, False),
        LIBRARY: case(reference.coupling_net, False),
        CHANNELS_LAST: case(reference.coupling_net, True),
    }
    check_equal({name: run() for name, run in found.items()}, f"net {shape}, {mode}")
    return found


@torch.no_grad()
def _without_record(function: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
    return function(*given)


def measure(configs: Sequence[str], rounds: int) -> list[NetRow]:
    """In this process, with its malloc."""
    rows = []
    for config in configs:
        for level, shape in enumerate(net_shapes(CONFIGS[config])):
            n, channels, hidden, height, width = shape
            macs = 9 * channels // 2 * hidden + hidden * hidden + 9 * channels * hidden
            for mode in (FORWARD, BOTH):
                flops = 2 * macs * n * height * width * (1 if mode == FORWARD else 3)
                for name, seconds in take_turns(net_cases(shape, mode), CPU, rounds, 60.0).items():
                    median = statistics.median(seconds)
                    facts = (config, level + 1, name, mode, malloc_setting(), device_name(CPU), *shape)
                    rows.append(NetRow(*facts, median, flops, flops / median / 1e9))  # type: ignore[arg-type]
    return rows


def table(rows: Sequence[NetRow]) -> str:
    """A line a net and direction: ours at its best over malloc settings, the library at its best of all."""
    lines = [f"{'net':>34} {'direction':>17} {'ours ms':>9} {'GFLOP/s':>8} {'library ms':>11} {'faster':>7}"]
    for key in dict.fromkeys((row.config, row.level, row.mode) for row in rows):
        here = [row for row in rows if (row.config, row.level, row.mode) == key]
        ours = min((row for row in here if row.implementation == OURS), key=lambda row: row.seconds)
        other = min((row for row in here if row.implementation != OURS), key=lambda row: row.seconds)
        size = f"({ours.batch}, {ours.channels}, {ours.height}, {ours.width}) hidden {ours.hidden}"
        lines.append(
            f"({key[0]}) {size:>30} {key[2]:>17} {1e3 * ours.seconds:9.2f} {ours.gigaflops:8.0f}"
            f" {1e3 * other.seconds:11.2f} {other.seconds / ours.seconds:7.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure under each malloc setting, print the table, write the file.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="nets", description="coupling nets alone", allow_abbrev=False)
    options.add_argument("--configs", type=chosen(list(CONFIGS)), default=list(CONFIGS), help="some of a,b,c,d,e")
    options.add_argument("--rounds", type=int, default=7, help="interleaved rounds (7)")
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for nets-cpu.json")
    options.add_argument("--here", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # for a process of ours
    arguments = options.parse_args(argv)
    if arguments.here is not None:
        write_json(arguments.here, machine(CPU), measure(arguments.configs, arguments.rounds))
        return 0
    rows: list[NetRow] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        for environment in malloc_environments().values():
            given = ["--configs", ",".join(arguments.configs), "--rounds", str(arguments.rounds), "--here", str(path)]
            code = run_module("bench.nets", given, environment)
            if code:
                return code
            content = json.loads(path.read_text(encoding="utf-8"))
            rows += [NetRow(**row) for row in content["rows"]]
    print(table(rows))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        settings = " and ".join(dict.fromkeys(row.malloc for row in rows))
        write_json(arguments.out / "nets-cpu.json", content["machine"] | {"malloc": settings}, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
