"""Coupling nets alone: ours against the library's convolutions, in float32 and bfloat16, at shapes that people have.

    python -m bench.nets [--nets a,fastflow] [--precision fp32,bf16] [--rounds 7] [--out DIR]

a to e are the nets of the model benchmark, one for each level; the others are in bench/net_cases.py. Forward is without
a record; forward+backward gives all gradients. The library runs ``reference.net_chain``, contiguous and channels_last;
bfloat16 is that of torch.autocast, for both. Every result is held against float64 before it is timed. All take turns,
the library's matrix products at the layers' shapes among them, in processes with two settings of malloc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import check_equal
from bench.harness import device_name, machine, malloc_environments, malloc_setting, run_module, write_json
from bench.models import chosen, take_turns
from bench.net_cases import (
    CPU,
    FORWARD,
    MODES,
    NETS,
    OURS,
    Net,
    Tensors,
    products_case,
    relative_errors,
)
from bench.precisions import MARGIN, PRECISIONS, dtype_name, net_error, net_gradient_error

PRODUCTS = "library's products"
FLOAT_TOLERANCE = 1e-3  # as cases.check_equal has it
SECONDS = 60.0  # of a net and direction; past them the least number of rounds does


@dataclasses.dataclass(frozen=True)
class NetRow:
    """A timed net: median and quartiles of a call, and its arithmetic beside that of the library's products.

    ``flops`` are those of the layers (net_cases.Net.flops); ``product_gigaflops`` was measured in the same rounds and
    the same dtype. ``errors``: of the values, or of the gradient of each tensor, relative to float64.
    """

    net: Net
    implementation: str
    mode: str
    dtype: str
    malloc: str
    device: str
    seconds: float
    seconds_low: float
    seconds_high: float
    rounds: int
    flops: int
    gigaflops: float
    product_gigaflops: float
    fraction_of_products: float
    errors: dict[str, float]

    @classmethod
    def of(cls, values: dict[str, Any]) -> NetRow:
        """Read a row from JSON."""
        return cls(**values | {"net": Net.of(values["net"])})


def tolerance(net: Net, mode: str, dtype: torch.dtype) -> float:
    """Derive how far the values or one gradient may be off, relative: what rounding does, see bench.precisions.

    In float32, too, a relu's argument near zero may have another sign, so that one gradient is off by all of itself.
    """
    if dtype == torch.float32:
        return FLOAT_TOLERANCE
    layers = len(net.widths)
    return MARGIN * (net_error(layers) if mode == FORWARD else net_gradient_error(layers))


def check(tensors: Tensors, mode: str, dtype: torch.dtype, name: str, found: Sequence[Tensor]) -> dict[str, float]:
    """The relative errors of a result.

    Raises:
        RuntimeError: it is not what float64 gives, so that its time means nothing.
    """
    net, exact = tensors.net, tensors.exact(mode)
    what = f"{net.title}, {mode}, {dtype_name(dtype)}"
    if mode == FORWARD and dtype == torch.float32:
        check_equal({"float64": exact, name: tuple(found)}, what)  # each element
    errors = relative_errors(tensors.names(mode), found, exact)
    limit = tolerance(net, mode, dtype)
    for tensor, error in errors.items():
        if not error <= limit:  # also NaN
            raise RuntimeError(f"{what}: {tensor} of {name} is off by {error:.1e}, more than {limit:.1e}")
    return errors


def measure(nets: Sequence[Net], dtypes: Sequence[torch.dtype], rounds: int, seconds: float = SECONDS) -> list[NetRow]:
    """Measure in this process, with its malloc; the dtypes of a net and direction in the same rounds."""
    rows = []
    for net in nets:
        tensors = Tensors(net)
        for mode in MODES:
            rows += _measure(tensors, mode, dtypes, rounds, seconds)
    return rows


def _measure(tensors: Tensors, mode: str, dtypes: Sequence[torch.dtype], rounds: int, seconds: float) -> list[NetRow]:
    net = tensors.net
    cases: dict[tuple[str, torch.dtype], Callable[[], object]] = {}
    errors = {}
    for dtype in dtypes:
        products = products_case(net, mode, dtype)
        products()
        cases[PRODUCTS, dtype] = products
        for name, run in tensors.cases(mode, dtype).items():
            errors[name, dtype] = check(tensors, mode, dtype, name, run())
            cases[name, dtype] = run
    named = {f"{name}, {dtype}": case for (name, dtype), case in cases.items()}
    times = dict(zip(cases, take_turns(named, CPU, rounds, seconds).values(), strict=True))
    flops, rows = net.flops(mode), []
    for (name, dtype), error in errors.items():
        values = times[name, dtype]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if values[1:] else 3 * values
        product_rate = flops / statistics.median(times[PRODUCTS, dtype])
        rows.append(
            NetRow(
                net=net,
                implementation=name,
                mode=mode,
                dtype=dtype_name(dtype),
                malloc=malloc_setting(),
                device=device_name(CPU),
                seconds=median,
                seconds_low=low,
                seconds_high=high,
                rounds=len(values),
                flops=flops,
                gigaflops=flops / median / 1e9,
                product_gigaflops=product_rate / 1e9,
                fraction_of_products=flops / median / product_rate,
                errors=error,
            )
        )
    return rows


HEAD = (
    f"{'net':<42} {'direction':<16} {'dtype':<8} {'ours ms':>9} {'GFLOP/s':>8} {'/products':>9} {'library ms':>10} "
    f"{'faster':>6} {'error':>8} {'library':>8} {'worst':>6}  the library at its best"
)


def table(rows: Sequence[NetRow]) -> str:
    """A line a net, direction and dtype: ours at its best over malloc settings, the library at its best of all.

    The errors are those of the tensor that is off the most; "worst" is the largest of the quotients ours / library's,
    tensor by tensor.
    """
    lines = [HEAD]
    for net, mode, dtype in dict.fromkeys((row.net, row.mode, row.dtype) for row in rows):
        here = [row for row in rows if (row.net, row.mode, row.dtype) == (net, mode, dtype)]
        ours = min((row for row in here if row.implementation == OURS), key=lambda row: row.seconds)
        other = min((row for row in here if row.implementation != OURS), key=lambda row: row.seconds)
        worst = max(error / max(other.errors[name], 1e-30) for name, error in ours.errors.items())
        lines.append(
            f"{net.title:<42} {mode:<16} {dtype:<8} {1e3 * ours.seconds:9.2f} {ours.gigaflops:8.0f}"
            f" {ours.fraction_of_products:9.2f} {1e3 * other.seconds:10.2f} {other.seconds / ours.seconds:6.2f}"
            f" {max(ours.errors.values()):8.1e} {max(other.errors.values()):8.1e} {worst:6.2f}"
            f"  {other.implementation}, {other.malloc} malloc"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(prog="nets", description="coupling nets alone", allow_abbrev=False)
    options.add_argument("--nets", type=chosen(list(NETS)), default=list(NETS), help=f"some of {','.join(NETS)}")
    options.add_argument(
        "--precision", type=chosen(list(PRECISIONS)), default=list(PRECISIONS), help="fp32,bf16 (both) or one of them"
    )
    options.add_argument("--rounds", type=int, default=7, help="interleaved rounds (7)")
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for nets-cpu.json")
    options.add_argument("--here", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # for a process of ours
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure under each malloc setting, print the table, write the file.

    Args:
        argv: the options; those of the process if None.
    """
    arguments = parser().parse_args(argv)
    if arguments.here is not None:
        nets = [net for name in arguments.nets for net in NETS[name]]
        dtypes = [PRECISIONS[name] for name in arguments.precision]
        write_json(arguments.here, machine(CPU), measure(nets, dtypes, arguments.rounds))
        return 0
    rows: list[NetRow] = []
    given = ["--precision", ",".join(arguments.precision), "--rounds", str(arguments.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        for environment in malloc_environments().values():
            options = ["--nets", ",".join(arguments.nets), *given, "--here", str(path)]
            code = run_module("bench.nets", options, environment)
            if code:
                return code
            content = json.loads(path.read_text(encoding="utf-8"))
            rows += [NetRow.of(row) for row in content["rows"]]
    print(table(rows))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        settings = " and ".join(dict.fromkeys(row.malloc for row in rows))
        write_json(arguments.out / "nets-cpu.json", content["machine"] | {"malloc": settings}, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
