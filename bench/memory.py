"""Training memory against depth and against resolution, and time against a budget of bytes.

    python -m bench.memory [--only depth,resolution] [--depths 8,32,128,512] [--sizes 64,128,256] [--out DIR]
    python -m bench.memory --only large [--sizes 256,1024] [--depths 4,16] [--device cuda] [--out DIR]
    python -m bench.memory --budgets [--cases a,b,c,e] [--out DIR]

The memory of one training step (forward and backward) beyond parameters and gradients; each curve and
implementation has a process of its own. Of each row, in bytes:

- ``held``: what torch's allocator gave out in the step and was alive at one time, at most; gradients were allocated
  before, as when they accumulate over batches. ``fresh``: the same where gradients begin as None, and what becomes one
  is not counted.

Ours includes the anchors. ``large`` is the depth on images of 256 and 1024 pixels, which takes a GPU. ``--budgets``:
ours given 25, 50, 75 and 100 % of the way from the peak of mode "reversible" to that of "store" (a peak is the larger
of ``held`` and ``fresh``), and plain torch with none, a quarter, a half, three quarters or all of its steps in
torch.utils.checkpoint, the same tensors in all of them, their gradients compared before they take turns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import harness
from bench.harness import Plan, Prepared, Row, chosen, synchronize
from bench.memory_meter import AllocatorTrace
from bench.model_cases import (
    CHECKPOINTED,
    CONFIGS,
    IMPLEMENTATIONS,
    OURS,
    PARTLY,
    PLAIN,
    TRAIN,
    Model,
    Shape,
    build,
    gradient_error,
    images,
    plain_levels,
    set_memory,
    training_step,
)

DEPTH = Shape((3, 32, 32), 3, 8, 128, 16)
RESOLUTION = Shape((3, 256, 256), 4, 32, 512, 1)
HUGE = Shape((3, 1024, 1024), 6, 32, 512, 1)
CURVES = ("depth", "resolution", "large")
DEPTHS, SIZES, LARGE_DEPTHS, LARGE_SIZES = [8, 32, 128], [64, 128, 256], [4, 16], [256, 1024]
QUICK_DEPTHS, QUICK_SIZES = [1, 2], [16]
ADAPTING = 4  # more passes of a mode that recomputes, after which the anchors have moved apart for the first time
CASES = ("a", "b", "c", "e")
PERCENTS = (25, 50, 75, 100)
PEERS = (PLAIN, *PARTLY, CHECKPOINTED)
TOLERANCE = 1e-3  # of gradients, relative
OVERHEAD = 2**30  # bytes that a process may have besides what is measured


def _given(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def peak_bytes(model: nn.Module, step: Callable[[], object], device: torch.device, fresh: bool) -> int:
    """Bytes that are alive at the peak; fresh: but for those that end as gradients."""
    gc.collect()
    if device.type != "cuda":
        with AllocatorTrace() as trace:
            step()
        return trace.peak_without(_given(model) if fresh else ())
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize(device)
    gradients = sum(grad.nbytes for grad in _given(model)) if fresh else 0
    return torch.cuda.max_memory_allocated(device) - before - gradients


def count(model: nn.Module, x: Tensor, passes: int) -> dict[str, Any]:
    """The bytes of a training step after so many passes, in which the anchors' spacing adapts."""
    step = training_step(model, x)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for _ in range(passes):
        step()
    found = {"held": peak_bytes(model, step, x.device, fresh=False)}
    model.zero_grad(set_to_none=True)
    found["fresh"] = peak_bytes(model, step, x.device, fresh=True)
    model.zero_grad(set_to_none=True)
    return found


def _step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """What is timed: zero_grad, forward and backward."""
    step = training_step(model, x)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        step()

    return run


def curve_shapes(arguments: argparse.Namespace) -> dict[str, Shape]:
    """The shapes of the curves that were asked for, by case."""
    found = {}
    quick = arguments.quick
    for curve in arguments.only:
        large = curve == "large"
        depths = arguments.depths or (QUICK_DEPTHS if quick else LARGE_DEPTHS if large else DEPTHS)
        sizes = arguments.sizes or (QUICK_SIZES if quick else LARGE_SIZES if large else SIZES)
        if curve == "depth":
            base = dataclasses.replace(DEPTH, image=(3, 16, 16), hidden=16, batch=2) if quick else DEPTH
            found |= {f"depth, K {k}": dataclasses.replace(base, n_steps=k) for k in depths}
            continue
        for side in sizes:
            base = HUGE if side == HUGE.image[1] else dataclasses.replace(RESOLUTION, image=(3, side, side))
            base = dataclasses.replace(base, n_steps=min(QUICK_DEPTHS), hidden=16) if quick else base
            if not large:
                found[f"resolution, {side} px"] = base
            for k in depths if large else ():
                found[f"depth at {side} px, K {k}"] = dataclasses.replace(base, n_steps=k)
    return found


def _curve_case(prepared: Prepared, arguments: argparse.Namespace, case: str, shape: Shape, name: str) -> None:
    device = arguments.device
    model, x = build(name, shape, device), images(shape, device)
    passes = arguments.passes + (ADAPTING if name == "reversible" and arguments.passes else 0)
    facts = count(model, x, passes) | {"shape": shape.title}
    prepared.cases.append((Row(case, TRAIN, name, facts=facts), _step(model, x)))


def _budget_cases(prepared: Prepared, arguments: argparse.Namespace, case: str) -> None:
    shape = CONFIGS[case].quick() if arguments.quick else CONFIGS[case]
    ours, x = build("store", shape, arguments.device), images(shape, arguments.device)
    peaks: dict[str, int] = {}
    exact: list[Tensor] = []

    def add(name: str, model: Model, budget: int | None = None) -> None:
        passes = arguments.passes + (ADAPTING if name in OURS[1:] or budget is not None else 0)
        facts = count(model, x, passes) | {"budget": budget, "shape": shape.title}
        peaks[name] = max(facts["held"], facts["fresh"])
        run = _step(model, x)
        run()
        gradients = [grad.clone() for grad in _given(model)]
        exact.extend(gradients if not exact else ())
        error = gradient_error(gradients, exact)
        if not error <= TOLERANCE:  # also NaN
            prepared.failures.append(f"({case}) {name}: gradients off by {error:.1e}, more than {TOLERANCE:.0e}")
        prepared.cases.append((Row(case, TRAIN, name, facts=facts), run))

    for name in PEERS:
        add(name, plain_levels(ours, name))
    for memory in OURS:
        own = copy.deepcopy(ours)  # so that none undoes what another's drift control has learnt
        set_memory(own, memory)
        add(memory, own)
    for percent in PERCENTS:
        budget = peaks["reversible"] + (peaks["store"] - peaks["reversible"]) * percent // 100
        own = copy.deepcopy(ours)
        try:
            set_memory(own, budget)
            add(f"{percent} %", own, budget)
        except ValueError as error:  # too few bytes, said when they are given or by the first step
            prepared.notes.append(f"({case}) {percent} %, {budget} bytes: refused: {error}")


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Count the bytes of what a process of the benchmark then times."""
    if arguments.limit is not None:
        import resource  # posix only, as the resident size of /proc

        limit = int(arguments.limit * 2**30) + OVERHEAD
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if arguments.budgets:
        for case in arguments.cases:
            _budget_cases(prepared, arguments, case)
        return
    for case, shape in curve_shapes(arguments).items():
        for name in arguments.implementations:
            try:
                _curve_case(prepared, arguments, case, shape, name)
            except ImportError as error:
                prepared.notes.append(f"{name} is left out: it cannot be imported ({error})")
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
                    raise
                prepared.notes.append(f"{case}, {name}: too large, {str(error).partition(chr(10))[0]}")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("memory", __doc__, rounds=3)
    options.set_defaults(malloc="here")
    options.add_argument("--only", type=chosen(CURVES), default=list(CURVES[:2]), help="depth,resolution; or large")
    names = list(IMPLEMENTATIONS)
    options.add_argument("--implementations", type=chosen(names), default=names, help=", ".join(names))
    whole = harness.numbers(int)
    options.add_argument("--depths", type=whole, help="K, separated by commas, in place of the standard ones")
    options.add_argument("--sizes", type=whole, help="sides of the images, in place of the standard ones")
    limit = "of a case on the CPU (8), where allocations beyond fail rather than take others' memory"
    options.add_argument("--limit", type=float, metavar="GIB", help=limit)
    passes = "training steps before bytes are counted (3), more where anchors adapt"
    options.add_argument("--passes", type=int, default=3, help=passes)
    options.add_argument("--budgets", action="store_true", help="time against bytes, in place of the curves")
    options.add_argument("--cases", type=chosen(CASES), default=list(CASES), help="with --budgets: some of a,b,c,e")
    return options


def plan(arguments: argparse.Namespace) -> Plan:
    """Each curve has a process for each implementation; of the budgets, each case has one."""
    limit = ["--limit", str(arguments.limit or 8.0)] if arguments.device.type == "cpu" else []
    if arguments.budgets:
        return "memory-budgets", [[*limit, "--cases", case] for case in arguments.cases]
    return "memory", [
        [*limit, "--only", curve, "--implementations", name]
        for curve in arguments.only
        for name in arguments.implementations
    ]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.memory"))
