"""Monotone splines of elements against those of nflows, which no kernel computes, and those under torch.compile.

    python -m bench.splines [--elements 1000,100000] [--bins 8] [--compile] [--out DIR]

x (N,) and numbers (N, 3 K - 1) side by side, as nflows' nets give them, linear tails, float32. Values are compared
before they are timed. "forward+backward" takes given gradients of value and log-slope to those of x and the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import harness
from bench.cases import check_equal
from bench.harness import Plan, Prepared, Row
from pyglow_fast import functional

OURS, NFLOWS, COMPILED = "pyglow_fast", "nflows", "nflows compiled"
BOUND = 3.0
Spline = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def by_nflows(bins: int) -> Spline:
    """The function of nflows, whose numbers come in three tensors."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    def spline(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        parts = raw[:, :bins], raw[:, bins : 2 * bins], raw[:, 2 * bins :]
        found: tuple[Tensor, Tensor] = unconstrained_rational_quadratic_spline(
            x, *parts, inverse=inverse, tails="linear", tail_bound=BOUND
        )
        return found

    return spline


def ours(x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The operation of this package."""
    return functional.spline(x, raw, bound=BOUND, inverse=inverse)


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Make the calls of each library for each number of elements, in each direction."""
    libraries = {NFLOWS: by_nflows(arguments.bins), OURS: ours}
    if arguments.compile:
        libraries[COMPILED] = torch.compile(by_nflows(arguments.bins), dynamic=False)
    for count in arguments.elements:
        x, raw = 2.0 * torch.randn(count), torch.randn(count, 3 * arguments.bins - 1)
        leaves, grads = [value.clone().requires_grad_() for value in (x, raw)], (torch.ones(count), torch.ones(count))

        def gradients(spline: Spline, leaves: list[Tensor] = leaves, grads: tuple[Tensor, ...] = grads) -> object:
            return torch.autograd.grad(spline(leaves[0], leaves[1], False), leaves, grads)

        for mode in ("forward", "inverse", "forward+backward"):
            calls: dict[str, Callable[[], object]] = {}
            for name, spline in libraries.items():
                if name == COMPILED and "backward" in mode:  # torch.compile of torch 2.13 gives wrong gradients of it
                    continue
                value = torch.no_grad()(partial(spline, x, raw, mode == "inverse"))
                calls[name] = partial(gradients, spline) if "backward" in mode else value
            check_equal({name: tuple(call()) for name, call in calls.items()}, f"{mode} of {count}")
            prepared.cases += [(Row(f"{count} elements", mode, name), call) for name, call in calls.items()]


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("splines", __doc__, rounds=9, seconds=300.0)
    options.add_argument("--elements", type=harness.numbers(int), help="such as 1000,100000")
    options.add_argument("--bins", type=int, default=8)
    options.add_argument("--compile", action="store_true", help="also nflows' function under torch.compile")
    return options


def plan(arguments: argparse.Namespace) -> Plan:
    """Each number of elements has a process."""
    elements = arguments.elements or ([100] if arguments.quick else [1000, 100_000])
    return "splines", [["--elements", str(count)] for count in elements]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.splines"))
