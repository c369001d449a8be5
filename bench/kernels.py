"""Every op, and the flow step outside its net: ours, the reference, and a copy.

    python -m bench.kernels [--shapes 8x12x64x64] [--only TEXT] [--compile] [--malloc both] [--out DIR]

The copy touches as many bytes as the case must move at least, half of them read and half written, into memory that is
already there. Every result is compared with the reference's before it is timed. Kernels of a GPU are timed by
bench/gpu_kernels.py.
"""

from __future__ import annotations

import argparse

import torch

from bench import harness
from bench.cases import SHAPES, Data, check_equal, copy_calls, kernel_cases, parse_shapes, shape_title, traffic
from bench.harness import CPU, Call, Plan, Prepared, Row
from pyglow_fast import functional, reference

OURS, PLAIN, COMPILED, COPY = "pyglow_fast", "reference", "reference compiled", "copy"
QUICK_SHAPES = [(2, 12, 8, 8)]


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Make the cases of some shapes; all implementations of one compute the same, or it is an error."""
    torch._dynamo.config.recompile_limit = 100  # all cases are one function to it: the ninth would run eagerly
    for shape in arguments.shapes:
        for case in kernel_cases(Data(shape, CPU)):
            if arguments.only not in case.name:
                continue
            runs = {OURS: case.build(functional, False), PLAIN: case.build(reference, False)}
            if arguments.compile and case.mode != "backward":
                runs[COMPILED] = case.build(reference, True)
            check_equal({name: runs[name]() for name in (PLAIN, *runs)}, f"{case.name} {shape}")
            (copying,) = copy_calls(traffic(case.op, case.mode, shape), 1, CPU)
            calls: dict[str, Call] = {**runs, COPY: copying}
            prepared.cases += [(Row(shape_title(shape), case.name, name), call) for name, call in calls.items()]


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("kernels", __doc__, rounds=9, seconds=300.0)
    options.add_argument("--shapes", type=parse_shapes, help="such as 4x12x64x64, separated by commas")
    options.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    options.add_argument("--compile", action="store_true", help="also the reference under torch.compile")
    return options


def plan(arguments: argparse.Namespace) -> Plan:
    """Each shape has a process."""
    shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    return "kernels", [["--shapes", shape_title(shape)] for shape in shapes]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.kernels"))
