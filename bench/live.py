"""Flows of projects that people run, before and after ``accelerate``: training step, inference, memory, and errors.

    PYTHONPATH=build/live python -m bench.live [--models a,b] [--precision bf16] [--batch N] [--quick] [--out DIR]

The flow part alone, on random features (bench/live_cases.py). Theirs, and copies of it with the same weights after
``accelerate(model)`` and with memory "store" and "reversible", take turns in one process. A training step is forward
and backward of the mean negative log-likelihood, inference the forward without gradients; an optimizer is no part of
it. With bf16 all are under torch.autocast. Outputs and gradients of every copy are held against theirs in float64: in
float64 they are to agree to 1e-9, in the precision that is measured to be off by at most twice as much as theirs (and
in float32 by four roundings, gradients by what relus do whose arguments have another sign).
Memory is what a training step has alive at its peak besides parameters and gradients (``fresh`` of bench/memory.py).
A project that is not installed is left out, by name; a model of which nothing is replaced is a row that says so.
"""

from __future__ import annotations

import argparse
import collections
import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import harness, live_cases
from bench.harness import CPU, PRECISIONS, Plan, Prepared, Row, autocast, chosen, default_dtype, dtype_name
from bench.live_cases import MODELS, LiveCase
from bench.memory import peak_bytes
from bench.model_cases import gradient_error
from pyglow_fast.interop import accelerate

THEIRS, ACCELERATED = "theirs", "accelerated"
VARIANTS = (THEIRS, ACCELERATED, "store", "reversible")
TRAIN, INFERENCE = "train step", "inference"
CHECKED = 2  # samples that outputs and gradients are compared on
QUICK_MODELS = ("fastflow-resnet18", "uflow", "glow-tts", "cflow")
QUICK_SHARE = 8  # of a model's own batch
EXACT = 1e-9  # relative, of outputs and gradients in float64
FACTOR = 2.0  # of the error of theirs, in the precision that is measured
# Float32 gradients may be off by so much, however little theirs are off: a relu's argument of zero mean that is off by
# a share e of its size has another sign with probability e / pi, where the gradient is wrong by all of itself, and
# elsewhere half of it is there: the square of its error is 2 e / pi, with e = 2^-23.
OTHER_SIGNS = (2.0 / math.pi * 2.0**-23) ** 0.5
# Float32 outputs may be off by so much: a log-det is one number, which theirs may have right by chance.
ROUNDED = 4.0 * 2.0**-23
Results = tuple[list[Tensor], list[Tensor]]  # outputs, gradients


def copied(case: LiveCase, model: nn.Module, variant: str) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of the model as the variant has it (of theirs, the model itself), and what accelerate did to it."""
    if variant == THEIRS:
        return model, {}
    twin = copy.deepcopy(model)
    if variant in case.also:
        case.also[variant](twin)
        return twin, {}
    try:
        done = accelerate(twin, None if variant == ACCELERATED else variant)
    except ValueError as error:  # there is no layer that any adapter knows
        return twin, {"replaced": 0, "note": f"nothing replaced: {error}"}
    joined = sum(run["steps"] for run in done.memory_report())
    return twin, {
        "replaced": len(done.replaced),
        "joined": joined,
        "left": dict(collections.Counter(done.left.values())),
    }


def loss_of(latents: Sequence[Tensor], log_det: Tensor) -> Tensor:
    """Mean negative log-likelihood of a dimension under a standard normal, up to a constant."""
    wide = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in latents]
    energy = torch.stack([z.square().flatten(1).sum(1) for z in wide]).sum(0) / 2
    return ((energy - log_det) / sum(z[0].numel() for z in wide)).mean()


def training_step(case: LiveCase, model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Run forward and backward; gradients begin as None."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(CPU, dtype):
            found = case.call(model, *case.features)
        loss_of(*found).backward()

    return step


def inference(case: LiveCase, model: nn.Module, dtype: torch.dtype) -> Callable[[], None]:
    """Run a forward without gradients."""

    def run() -> None:
        with torch.no_grad(), autocast(CPU, dtype):
            case.call(model, *case.features)

    return run


def activation_bytes(case: LiveCase, model: nn.Module, dtype: torch.dtype) -> int:
    """The peak of a training step, but for the gradients of the parameters, when the spacing of anchors has settled."""
    step = training_step(case, model, dtype)
    for _ in range(2):
        step()
    model.zero_grad(set_to_none=True)  # what is freed inside would count less than nothing
    size = peak_bytes(model, step, CPU, fresh=True)
    model.zero_grad(set_to_none=True)
    return size


def results(case: LiveCase, model: nn.Module, dtype: torch.dtype) -> Results:
    """Latents and log-determinants of the first samples, and the gradients of parameters and data."""
    double = dtype == torch.float64
    features = [value[:CHECKED].to(dtype if double else value.dtype) for value in case.features]
    data = [value.clone().requires_grad_() for value in features[: case.n_data]]
    with default_dtype(dtype if double else torch.float32):
        with autocast(CPU, torch.float32 if double else dtype):
            latents, log_det = case.call(model, *data, *features[case.n_data :])
        wanted = [*(value for value in model.parameters() if value.requires_grad), *data]
        gradients = torch.autograd.grad(loss_of(latents, log_det), wanted, allow_unused=True)
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, gradients, strict=True)]
    return [value.detach() for value in (*latents, log_det)], filled


def errors(found: Results, exact: Results, prefix: str = "") -> dict[str, float]:
    """The relative errors of all outputs together and of all gradients together."""
    parts = zip(("outputs", "gradients"), found, exact, strict=True)
    return {f"{prefix}{name}": gradient_error(values, truth) for name, values, truth in parts}


def faults(found: dict[str, float], theirs: dict[str, float], dtype: torch.dtype) -> str:
    """Tells what is wrong with a copy's errors beside theirs; nothing if they are right. NaN is wrong."""
    lines = []
    for name in ("outputs", "gradients"):
        exact, error = found[f"float64 {name}"], found[name]
        if not exact <= EXACT:
            lines.append(f"{name} in float64 off by {exact:.1e}")
        least = {"outputs": ROUNDED, "gradients": OTHER_SIGNS}[name] if dtype == torch.float32 else 0.0
        if not error <= max(least, FACTOR * theirs[name]):
            lines.append(f"{name} off by {error:.1e}, theirs by {theirs[name]:.1e}")
    return "; ".join(lines)


def prepare(prepared: Prepared, arguments: argparse.Namespace) -> None:
    """Build a model, check its copies, and measure their memory."""
    for name in arguments.models:
        batch = arguments.batch or (max(1, MODELS[name][1] // QUICK_SHARE) if arguments.quick else None)
        try:
            case = live_cases.build(name, batch)
        except ImportError as error:
            prepared.notes.append(f"{name} is left out: {error} (make test-live installs it)")
            continue
        for precision in arguments.precision:
            _prepare(prepared, name, case, PRECISIONS[precision])


def _prepare(prepared: Prepared, name: str, case: LiveCase, dtype: torch.dtype) -> None:
    double = copy.deepcopy(case.model).double()
    exact = results(case, double, torch.float64)
    theirs = errors(results(case, case.model, dtype), exact)
    for variant in (*VARIANTS, *case.also):
        facts: dict[str, Any] = {"batch": case.features[0].shape[0], "source": case.source}
        calls: dict[str, Callable[[], None]] = {}
        try:
            own, done = copied(case, case.model, variant)
            facts |= done
            if done.get("replaced", 1):
                found = errors(results(case, own, dtype), exact)
                again = results(case, copied(case, double, variant)[0], torch.float64) if variant != THEIRS else exact
                facts["errors"] = found | errors(again, exact, "float64 ")
                if text := faults(facts["errors"], theirs, dtype):
                    raise ValueError(text)
                facts["activation_bytes"] = activation_bytes(case, own, dtype)
                calls = {TRAIN: training_step(case, own, dtype), INFERENCE: inference(case, own, dtype)}
        except Exception as error:  # whatever an adapter does, the other rows are measured
            facts["note"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            prepared.failures.append(f"{name}, {variant}, {dtype_name(dtype)}: {facts['note']}")
        prepared.cases.append((Row(name, TRAIN, variant, dtype=dtype_name(dtype), facts=facts), calls.get(TRAIN)))
        prepared.cases.append((Row(name, INFERENCE, variant, dtype=dtype_name(dtype)), calls.get(INFERENCE)))


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = harness.make_parser("live", __doc__, seconds=60.0)
    options.set_defaults(malloc="here")
    all_models = list(MODELS)
    options.add_argument("--models", type=chosen(all_models), help=f"some of {','.join(MODELS)} (all)")
    options.add_argument("--precision", type=chosen(list(PRECISIONS)), help="fp32,bf16 (both; quick: fp32) or one")
    options.add_argument("--batch", type=int, help="samples, of every model; each has its own by default")
    return options


def plan(arguments: argparse.Namespace) -> Plan:
    """Each model has a process for each precision."""
    models = arguments.models or (QUICK_MODELS if arguments.quick else MODELS)
    precisions = arguments.precision or (["fp32"] if arguments.quick else PRECISIONS)
    return "live", [["--models", model, "--precision", precision] for model in models for precision in precisions]


if __name__ == "__main__":
    raise SystemExit(harness.run("bench.live"))
