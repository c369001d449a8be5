"""The first facts of a device, in seconds: every op, a training step in each memory mode, and a CUDA graph of one.

    python -m bench.gpu_smoke [--device cuda] [--unchecked] [--until T] [--out FILE]

An op runs on small shapes with ragged ends, forward, backward and inverse, the net's output in float32 and in bfloat16,
in either layout. A result may be off by twice what plain torch on the CPU is off by in float32, both against float64,
and by a few roundings of the largest value. ``--unchecked`` runs all but the graphs and compares nothing: it is what
compute-sanitizer watches. Checks are ordered by what they tell.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Data, kernel_cases, matrix_cases, shape_title
from bench.gpu_questions import Question, Row, replayed, run, stage_options, until_replayed
from bench.harness import CPU, synchronize
from bench.model_cases import OURS, PLAIN, Shape, build, gradient_error, images, plain_levels
from pyglow_fast import functional, graphed, reference

# Channels that 4 divides and others, H != W, ends of tiles and vectors that are not full, a single position.
SHAPES = [(2, 4, 5, 9), (3, 5, 7, 3), (1, 131, 3, 5), (1, 12, 40, 33), (2, 48, 16, 12), (3, 8, 1, 1)]
# The forms of what the coupling reads, as a net puts it out that runs in float32 or bfloat16, in either layout.
FORMS = list(itertools.product((torch.float32, torch.bfloat16), (torch.contiguous_format, torch.channels_last)))
ROUNDINGS = 8.0  # of the largest value: where plain torch is exact by chance, and sums over positions are longer
MODEL = Shape((3, 8, 8), n_levels=2, n_steps=2, hidden=16, batch=4)
# Relative: a relu whose argument is near zero may let the gradient pass in float32 and not in float64.
GRADIENTS = 1e-3
ROUND_TRIP = 1e-4  # of values of about 1 through four steps and back
Form = tuple[torch.dtype, torch.memory_format]
Errors = dict[str, tuple[float, float]]  # of each output: how far it is off, and how far it may be


def output_errors(
    name: str, found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each may be off by twice as much as plain torch's, and by ROUNDINGS of its largest value."""
    for index, (value, beside, truth) in enumerate(zip(found, plain, exact, strict=True)):
        off, also = (float((x.detach().cpu().double() - truth.detach()).abs().max()) for x in (value, beside))
        eps = torch.finfo(value.dtype).eps
        yield f"{name}, output {index}", (off, 2.0 * also + ROUNDINGS * eps * float(truth.detach().abs().max()))


def judged(errors: Errors) -> Row:
    """Wrong is what is off by more than it may be, or NaN; where nothing is, the row names what comes nearest to it."""
    wrong = [name for name, (off, most) in errors.items() if not off <= most]
    shown = wrong or [max(errors, key=lambda name: errors[name][0] - errors[name][1])]
    words = (f"{name} off by {errors[name][0]:.1e} (at most {errors[name][1]:.1e})" for name in shown)
    return {"failed": bool(wrong), "note": "; ".join(words)}


def titled(shape: tuple[int, ...], form: Form) -> str:
    """A shape and a form in tables."""
    return f"{shape_title(shape)}, net's output {', '.join(str(part).removeprefix('torch.') for part in form)}"


def data_of(shape: tuple[int, ...], form: Form) -> Data:
    """The tensors of a shape on the CPU, the net's output in one of FORMS."""
    data, (dtype, layout) = Data(shape, CPU), form
    data.net_out = data.net_out.to(dtype=dtype, memory_format=layout)
    return data


def cases_of(data: Data) -> list[Case]:
    """Every op that has a CUDA kernel, and the flow step outside its net."""
    return [*kernel_cases(data), *matrix_cases(data)]


def check_cases(shape: tuple[int, ...], form: Form, device: torch.device) -> Row:
    """Runs every op by our kernels, and on the CPU by the reference in float32 and in float64."""
    data = data_of(shape, form)
    three = (cases_of(data.copy(device)), cases_of(data), cases_of(data.copy(dtype=torch.float64)))
    errors: Errors = {}
    for ours, plain, exact in zip(*three, strict=True):
        found = ours.build(functional, False)()
        synchronize(device)
        errors |= output_errors(ours.name, found, plain.build(reference, False)(), exact.build(reference, False)())
    return judged(errors)


def model_and_images(memory: str, device: torch.device) -> tuple[Any, Tensor]:
    """The small model in a memory mode, whose nets put out something."""
    return build(memory, MODEL, device), images(MODEL, device)


def gradients_of(model: Any, x: Tensor) -> list[Tensor]:
    """The gradients of the mean of -log_prob, parameter by parameter."""
    return list(torch.autograd.grad(-model.log_prob(x).mean(), list(model.parameters())))


def check_step(memory: str, tf32: bool, device: torch.device) -> Row:
    """The gradients of a training step against float64."""
    torch.backends.cudnn.allow_tf32 = tf32
    model, x = model_and_images(memory, device)
    exact = gradients_of(plain_levels(copy.deepcopy(model).double(), PLAIN), x.double())
    plain, _ = gradient_error(gradients_of(plain_levels(model, PLAIN), x), exact)
    return judged({"gradients": (gradient_error(gradients_of(model, x), exact)[0], 2.0 * plain + GRADIENTS)})


def check_inverse(device: torch.device) -> Row:
    """x from its latents."""
    model, x = model_and_images(OURS[0], device)
    with torch.no_grad():
        return judged({"x": (float((model.decode(model.encode(x)) - x).abs().max()), ROUND_TRIP)})


def check_replay(memory: str, device: torch.device) -> Row:
    """Losses and gradients of a captured training step, replayed on other images, against the eager one."""
    model, x = model_and_images(memory, device)
    step = graphed(model)
    until_replayed(lambda: step(x), lambda: step.how)
    other = x.flip(0).roll(1, dims=-1)
    loss, gradients = float(-model.log_prob(other).mean()), gradients_of(model, other)
    off = max(abs(float(step(other)) - loss) for _ in range(2))
    found, _ = gradient_error([parameter.grad for parameter in model.parameters()], gradients)
    row = judged({"loss": (off, 1e-4 * max(1.0, abs(loss))), "gradients": (found, GRADIENTS)})
    return replayed(row, step.how)


def checks(device: torch.device) -> Iterator[Question]:
    """The graphs and steps of a small model in each memory mode, its inverse, and every op on every shape."""
    if device.type == "cuda":  # on which alone graphs are captured
        for memory in OURS:
            yield f"CUDA graph of a training step, {memory}", functools.partial(check_replay, memory, device)
    for tf32, memory in itertools.product((True, False), OURS):
        name = f"training step, {memory}, TF32 {'on' if tf32 else 'off'}"
        yield name, functools.partial(check_step, memory, tf32, device)
    yield "decode(encode(x))", functools.partial(check_inverse, device)
    for shape, form in itertools.product(SHAPES, FORMS):
        yield f"ops, {titled(shape, form)}", functools.partial(check_cases, shape, form, device)


def groups(arguments: argparse.Namespace) -> list[Callable[[], Iterable[Question]]]:
    """All checks; with ``--unchecked`` a training step in two memory modes, then every case."""
    device = arguments.device

    def steps() -> Iterator[Question]:
        for memory in ("store", "reversible"):
            yield f"training step, {memory}", functools.partial(gradients_of, *model_and_images(memory, device))

    def ops(shape: tuple[int, ...], form: Form) -> Iterator[Question]:
        for case in cases_of(data_of(shape, form).copy(device)):
            yield f"{case.name}, {titled(shape, form)}", case.build(functional, False)

    if not arguments.unchecked:
        return [functools.partial(checks, device)]
    return [steps, *(functools.partial(ops, *of) for of in itertools.product(SHAPES, FORMS))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, and print and write what was found; the exit code is that of ``gpu_questions.run``.

    Args:
        argv: the options; those of the process if None.
    """
    options = stage_options("gpu_smoke", "first facts")
    options.add_argument("--unchecked", action="store_true", help="run and compare nothing")
    return run(options, argv, (), groups)


if __name__ == "__main__":
    raise SystemExit(main())
