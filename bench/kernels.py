"""Every op, and the flow step outside its net, by pytest-benchmark: ours, the reference, and a copy.

    python -m bench.kernels [--shapes 8x12x64x64] [--only TEXT] [--compile] [--malloc both] [--out DIR]
    python -m pytest bench/kernels.py --benchmark-only          # with all of pytest-benchmark's own options

The copy touches as many bytes as the case must move at least, half of them read and half written, into memory that is
already there. Every result is compared with the reference's before it is timed. On the CPU the command runs
pytest-benchmark in processes with two settings of malloc. Kernels of a GPU are timed by bench/gpu_kernels.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import harness
from bench.cases import SHAPES, Data, Run, check_equal, kernel_cases, parse_shapes, traffic
from bench.harness import ROOT, Row, machine, malloc_environments, text_table, write_json
from pyglow_fast import functional, reference

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

OURS, PLAIN, COMPILED, COPY = "pyglow_fast", "reference", "reference compiled", "copy"
QUICK_SHAPES = [(2, 12, 8, 8)]
OPTIONS = "PYGLOW_BENCH_KERNELS"  # the environment variable through which the command tells pytest what to run


@functools.lru_cache(maxsize=1)  # the parameters of a shape come one after another
def data_of(shape: tuple[int, ...]) -> Data:
    """The tensors of a shape."""
    return Data(shape, harness.CPU)


def run_of(case: str, shape: tuple[int, ...], implementation: str) -> Run:
    """The call that is timed: a case on one shape by one implementation, which is compared with plain torch first."""
    data = data_of(shape)
    found = next(one for one in kernel_cases(data) if one.name == case)
    if implementation == COPY:
        source = torch.zeros(max(1, traffic(found.op, found.mode, shape) // 8))
        target = torch.zeros_like(source)
        return lambda: (target.copy_(source),)
    run = found.build(functional if implementation == OURS else reference, implementation == COMPILED)
    check_equal({PLAIN: found.build(reference, False)(), implementation: run()}, f"{case} {shape}")
    return run


def parameters(options: dict[str, Any]) -> list[tuple[tuple[int, ...], str, str]]:
    """(shape, case, implementation) of all that is to be timed."""
    probe = kernel_cases(Data((1, 4, 3, 3), harness.CPU))
    found = []
    for shape in map(tuple, options.get("shapes") or SHAPES):
        for case in probe:
            names = [OURS, PLAIN, COPY] + [COMPILED] * (options.get("compile", False) and case.compiles)
            found += [(shape, case.name, name) for name in names if options.get("only", "") in case.name]
    return found


def pytest_generate_tests(metafunc: Any) -> None:
    """Parametrise :func:`test_kernel` by what the command asks for, or by everything."""
    options = json.loads(os.environ.get(OPTIONS, "{}"))
    values = parameters(options)
    ids = [f"{'x'.join(map(str, shape))}-{case}-{name}".replace(" ", "_") for shape, case, name in values]
    metafunc.parametrize(("shape", "case", "implementation"), values, ids=ids)


def test_kernel(benchmark: BenchmarkFixture, shape: tuple[int, ...], case: str, implementation: str) -> None:
    """Time one implementation of one case."""
    run = run_of(case, shape, implementation)
    benchmark.group = f"{case} {'x'.join(map(str, shape))}"
    benchmark.extra_info |= {"case": "x".join(map(str, shape)), "what": case, "name": implementation}
    benchmark(run)


def _rows(path: Path, malloc: str) -> list[Row]:
    """The rows of pytest-benchmark's JSON."""
    found = []
    for item in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
        info, stats = item["extra_info"], item["stats"]
        times = {"seconds": stats["median"], "seconds_low": stats["q1"], "seconds_high": stats["q3"]}
        found.append(Row(info["case"], info["what"], info["name"], malloc=malloc, rounds=stats["rounds"], **times))
    return found


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(prog="bench kernels", description=__doc__, allow_abbrev=False)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for kernels-cpu.json")
    options.add_argument("--shapes", type=parse_shapes, help="such as 4x12x64x64, separated by commas")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    options.add_argument("--compile", action="store_true", help="also the reference under torch.compile")
    options.add_argument("--seconds", type=float, default=1.0, help="of each case and implementation (1)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options.add_argument("--malloc", choices=["both", "default", "tuned", "here"], default="both")
    options.add_argument("--quick", action="store_true", help="one small shape, shortly: to see that it works")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run pytest-benchmark, print the table, write the file.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0, or pytest's exit code.
    """
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else None)
    asked = {"shapes": shapes, "only": arguments.only, "compile": arguments.compile}
    seconds = 0.01 if arguments.quick else arguments.seconds
    rows: list[Row] = []
    environments = malloc_environments(arguments.malloc)
    for malloc, environment in environments.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "benchmark.json")
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--no-header",
                "-p",
                "no:cacheprovider",
                "bench/kernels.py",
            ]
            command += ["--benchmark-only", f"--benchmark-json={path}", f"--benchmark-max-time={seconds}"]
            command += ["--benchmark-min-rounds=5", "--benchmark-columns=median,iqr,rounds"]
            own = {OPTIONS: json.dumps(asked), "OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(command, cwd=ROOT, env=environment | own, check=False)
            if done.returncode:
                return done.returncode
            rows += _rows(path, malloc)
    print(text_table(rows))
    if arguments.out is not None:
        facts = machine(harness.CPU) | {"malloc": " and ".join(environments), "threads": str(arguments.threads)}
        write_json(arguments.out / "kernels-cpu.json", facts, rows, notes=[])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
