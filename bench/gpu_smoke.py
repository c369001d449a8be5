"""The first facts of a device, in seconds: every op, a training step in each memory mode, and a CUDA graph of one.

    python -m bench.gpu_smoke [--device cuda] [--unchecked] [--seconds S] [--out FILE]

Each check prints a line and goes on after a failure, since the next one tells something else; the file is written anew
after each. An op runs on small shapes with ragged ends, forward, backward and inverse, the net's output in float32 and
in bfloat16, in either layout. A result may be off by twice what plain torch on the CPU is off by in float32, both
against float64, and by a few roundings of the largest value. ``--unchecked`` runs all but the graphs and compares
nothing: it is what compute-sanitizer watches. No check begins after ``--seconds``; they are ordered by what they tell.
"""

from __future__ import annotations

import copy
import itertools
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Data, has_kernels, kernel_cases, matrix_cases, stage_options
from bench.gpu_stages import NO_KERNELS, Budget
from bench.harness import machine, synchronize, write_json
from bench.model_cases import PLAIN, Shape, build, images, plain_levels
from pyglow_fast import functional, graphed, reference
from pyglow_fast.models.replays import WARM_UPS

# Channels that 4 divides and others, H != W, ends of tiles and vectors that are not full, a single position.
SHAPES = [(2, 4, 5, 9), (3, 5, 7, 3), (1, 131, 3, 5), (1, 12, 40, 33), (2, 48, 16, 12), (3, 8, 1, 1)]
# The forms of what the coupling reads, as a net puts it out that runs in float32 or bfloat16, in either layout.
FORMS = {
    "float32": (torch.float32, torch.contiguous_format),
    "bfloat16": (torch.bfloat16, torch.contiguous_format),
    "float32, channels_last": (torch.float32, torch.channels_last),
    "bfloat16, channels_last": (torch.bfloat16, torch.channels_last),
}
CPU = torch.device("cpu")
ROUNDINGS = 8.0  # of the largest value: where plain torch is exact by chance, and sums over positions are longer
MODEL = Shape((3, 8, 8), n_levels=2, n_steps=2, hidden=16, batch=4)
# Relative: a relu whose argument is near zero may let the gradient pass in float32 and not in float64.
GRADIENTS = 1e-3
ROUND_TRIP = 1e-4  # of values of about 1 through four steps and back
MODES = ("store", "checkpoint", "reversible")
Errors = list[tuple[float, float]]  # of each output: how far it is off, and how far it may be


def output_errors(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> Errors:
    """Each may be off by twice as much as plain torch's, and by ROUNDINGS of its largest value."""
    errors = []
    for value, beside, truth in zip(found, plain, exact, strict=True):
        off, also = (float((x.detach().cpu().double() - truth.detach()).abs().max()) for x in (value, beside))
        eps = torch.finfo(value.dtype).eps
        errors.append((off, 2.0 * also + ROUNDINGS * eps * float(truth.detach().abs().max())))
    return errors


def data_of(shape: tuple[int, ...], form: str) -> Data:
    """The tensors of a shape on the CPU, the net's output in one of FORMS."""
    data, (dtype, layout) = Data(shape, CPU), FORMS[form]
    data.net_out = data.net_out.to(dtype=dtype, memory_format=layout)
    return data


def cases_of(data: Data) -> list[Case]:
    """Every op that has a CUDA kernel, and the flow step outside its net."""
    return [*kernel_cases(data), *matrix_cases(data)]


Check = tuple[str, Callable[..., Errors], tuple[object, ...]]  # a name, what runs it, and with what before the device


class Checks:
    """Runs checks, prints a line for each, and keeps a row for each in a file."""

    def __init__(self, device: torch.device, out: Path | None) -> None:
        self.device, self.out, self.facts = device, out, machine(device)
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, check: Callable[..., Errors], *arguments: object) -> None:
        """Run one, which passes if nothing is off by more than it may be, and nothing is NaN."""
        try:
            errors = check(*arguments, self.device)
            passed = all(off <= most for off, most in errors)
            text = "off by " + ", ".join(f"{off:.1e} (at most {most:.1e})" for off, most in errors)
        except Exception:  # whatever is raised is what this is for
            passed, text = False, traceback.format_exc(limit=-3)[-1500:]
        self.rows.append({"check": name, "passed": passed, "text": text})
        print(f"{'passed' if passed else 'FAILED'} {name}: {text}", flush=True)
        if self.out is not None:
            write_json(self.out, self.facts, self.rows)


def cases_errors(shape: tuple[int, ...], form: str, device: torch.device) -> Errors:
    """Runs every op by our kernels, and on the CPU by the reference in float32 and in float64."""
    data, errors = data_of(shape, form), list[tuple[float, float]]()
    for ours, plain, exact in zip(
        *map(cases_of, (data.copy(device), data, data.copy(dtype=torch.float64))), strict=True
    ):
        found = ours.build(functional, False)()
        synchronize(device)
        some = output_errors(found, plain.build(reference, False)(), exact.build(reference, False)())
        wrong = [error for error in some if not error[0] <= error[1]]
        if wrong:
            print(f"  {ours.name}: {wrong}", flush=True)
        errors += some
    return errors


def model_and_images(memory: str, device: torch.device) -> tuple[Any, Tensor]:
    """The small model in a memory mode, whose nets put out something."""
    return build(memory, MODEL, "auto", device), images(MODEL, device)


def gradients_of(model: Any, x: Tensor) -> list[Tensor]:
    """The gradients of the mean of -log_prob, parameter by parameter."""
    return list(torch.autograd.grad(-model.log_prob(x).mean(), list(model.parameters())))


def gradient_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """sqrt(sum |g - e|^2 / sum |e|^2) over all tensors."""
    wrong = sum(float((g.double() - e.double()).square().sum()) for g, e in zip(found, exact, strict=True))
    return float((wrong / sum(float(e.double().square().sum()) for e in exact)) ** 0.5)


def step_errors(memory: str, tf32: bool, device: torch.device) -> Errors:
    """The gradients of a training step against float64."""
    torch.backends.cudnn.allow_tf32 = tf32
    model, x = model_and_images(memory, device)
    exact = gradients_of(plain_levels(copy.deepcopy(model).double(), PLAIN), x.double())
    plain = gradient_error(gradients_of(plain_levels(model, PLAIN), x), exact)
    return [(gradient_error(gradients_of(model, x), exact), 2.0 * plain + GRADIENTS)]


def inverse_errors(device: torch.device) -> Errors:
    """x from its latents."""
    model, x = model_and_images(MODES[0], device)
    with torch.no_grad():
        return [(float((model.decode(model.encode(x)) - x).abs().max()), ROUND_TRIP)]


def replay_errors(memory: str, device: torch.device) -> Errors:
    """Losses and gradients of a captured training step, replayed on other images, against the eager one."""
    model, x = model_and_images(memory, device)
    step = graphed(model)
    for _ in range(WARM_UPS + 1):
        step(x)
    other = x.flip(0).roll(1, dims=-1)
    loss, gradients = float(-model.log_prob(other).mean()), gradients_of(model, other)
    losses = [float(step(other)) for _ in range(2)]
    found = gradient_error([parameter.grad for parameter in model.parameters()], gradients)
    return [*((abs(value - loss), 1e-4 * max(1.0, abs(loss))) for value in losses), (found, GRADIENTS)]


def all_checks(device: torch.device) -> list[Check]:
    """The graphs and steps of a small model in each memory mode, its inverse, and every op on every shape."""
    found: list[Check] = []
    if device.type == "cuda":
        found += [(f"CUDA graph of a training step, {memory}", replay_errors, (memory,)) for memory in MODES]
    else:
        print("skipped CUDA graphs: they are captured on a GPU alone")
    for tf32 in (True, False):
        name = f"TF32 {'on' if tf32 else 'off'}"
        found += [(f"training step, {memory}, {name}", step_errors, (memory, tf32)) for memory in MODES]
    found.append(("decode(encode(x))", inverse_errors, ()))
    for shape in SHAPES:
        for form in FORMS:
            found.append((f"ops, {'x'.join(map(str, shape))}, net's output {form}", cases_errors, (shape, form)))
    return found


def watched(device: torch.device, budget: Budget) -> None:
    """Run a training step in two memory modes, and every case; compare nothing."""
    for memory in budget.take(("store", "reversible")):
        gradients_of(*model_and_images(memory, device))
        synchronize(device)
        print("training step,", memory, flush=True)
    for shape, form in budget.take(list(itertools.product(SHAPES, FORMS))):
        for case in cases_of(data_of(shape, form).copy(device)):
            print(case.name, shape, form, flush=True)
            case.build(functional, False)()
            synchronize(device)  # so that a fault is told of the case whose it is


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; 1 if one failed, NO_KERNELS if there are none for the device."""
    options = stage_options("gpu_smoke", "first facts")
    options.add_argument("--unchecked", action="store_true", help="run and compare nothing")
    arguments = options.parse_args(argv)
    device = arguments.device
    if not has_kernels(device):
        return NO_KERNELS
    budget = Budget(arguments.seconds)
    if arguments.unchecked:
        watched(device, budget)
        return budget.code(0)
    checks = Checks(device, arguments.out)
    print(checks.facts, flush=True)
    for name, check, given in budget.take(all_checks(device)):
        checks.run(name, check, *given)
    failed = [row for row in checks.rows if not row["passed"]]
    print("\n".join(f"FAILED {row['check']}: {row['text'].splitlines()[-1]}" for row in failed))
    return budget.code(int(bool(failed)))


if __name__ == "__main__":
    raise SystemExit(main())
