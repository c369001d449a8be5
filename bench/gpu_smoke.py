"""The first facts of a device, in seconds: every op, a training step in each memory mode, and CUDA graphs.

    python -m bench.gpu_smoke [--device cuda] [--unchecked] [--only TEXT ...] [--until T] [--out FILE]

An op runs on small shapes with ragged ends, forward, backward and inverse, the net's output in float32 and in bfloat16,
in either layout. A result may be off by twice what plain torch on the CPU is off by in float32, both against float64,
and by a few roundings of the largest value. ``--unchecked`` runs all but the graphs and compares nothing: it is what
compute-sanitizer watches. Graphs come last, since a capture that fails may spoil what its process does next.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Data, kernel_cases, matrix_cases, shape_title
from bench.gpu_questions import GRAPH, Question, Row, replayed, run, stage_options, until_replayed
from bench.harness import CPU, synchronize
from bench.model_cases import OURS, PLAIN, Shape, ThreeConvolutions, build, gradient_error, images, plain_levels, wake
from pyglow_fast import Glow, functional, graphed, reference
from pyglow_fast.models import GlowConfig

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
    plain = gradient_error(gradients_of(plain_levels(model, PLAIN), x), exact)
    return judged({"gradients": (gradient_error(gradients_of(model, x), exact), 2.0 * plain + GRADIENTS)})


def check_inverse(device: torch.device) -> Row:
    """x from its latents."""
    model, x = model_and_images(OURS[0], device)
    with torch.no_grad():
        return judged({"x": (float((model.decode(model.encode(x)) - x).abs().max()), ROUND_TRIP)})


def check_replay(model: Any, x: Tensor, asked: bool) -> Row:
    """Losses and gradients of a captured training step, replayed on other images, against the eager one."""
    step = graphed(model)
    until_replayed(lambda: step(x), lambda: step.how)
    other = x.flip(0).roll(1, dims=-1)
    loss, gradients = float(-model.log_prob(other).mean()), gradients_of(model, other)
    off = max(abs(float(step(other)) - loss) for _ in range(2))
    found = gradient_error([parameter.grad for parameter in model.parameters()], gradients)
    row = judged({"loss": (off, 1e-4 * max(1.0, abs(loss))), "gradients": (found, GRADIENTS)})
    return replayed(row, step.how, asked)


def check_together(model: Any, x: Tensor, asked: bool) -> Row:
    """Training and sampling graphs of one model, by turns and while its weights change, against eager calls."""
    step = graphed(model)
    until_replayed(lambda: (step(x), step.sample(len(x), 0.0)), lambda: step._sampling.how)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1e-4 * parameter.grad)
        found, expected = step.sample(len(x), 0.0), model.sample(len(x), 0.0)
        torch.testing.assert_close(step(x), -model.log_prob(x).mean(), rtol=1e-4, atol=ROUND_TRIP)
        torch.testing.assert_close(found, expected, rtol=ROUND_TRIP, atol=ROUND_TRIP)
    how = step.how if step.how != GRAPH else step._sampling.how
    return replayed({"failed": False, "note": "as eager calls"}, how, asked)


def check_broken(device: torch.device) -> Row:
    """A capture that CUDA breaks off; then eager steps, the allocator, random numbers, and a second capture."""
    reads, asked = [True], device.type == "cuda"

    class Reading(ThreeConvolutions):
        def forward(self, x: Tensor, context: None = None) -> Tensor:
            if reads and asked and torch.cuda.is_current_stream_capturing():
                float(x.sum())  # in a capture alone, so that no rehearsal finds it
            return super().forward(x)

    model: Any = Glow(GlowConfig(*dataclasses.astuple(MODEL)[:3]), net=lambda *sizes: Reading(*sizes, MODEL.hidden))
    wake(model)
    model.initialize(images(MODEL, CPU))
    step, x = graphed(model.to(device)), images(MODEL, device)
    until_replayed(lambda: step(x), lambda: step.how)
    why = step.how
    torch.testing.assert_close(step(x), -model.log_prob(x).mean(), rtol=1e-4, atol=ROUND_TRIP)
    if asked:
        torch.cuda.empty_cache()
    spread = float(torch.randn(10000, device=device).std())
    reads.clear()
    row = check_replay(model, x, asked)
    wrong = row["failed"] or (asked and why == GRAPH) or abs(spread - 1.0) > 0.1
    return {"failed": wrong, "note": f"{why}; spread of random numbers {spread:.2f}; {row['note']}"}


def checks(device: torch.device) -> Iterator[Question]:
    """Steps of a small model in each memory mode, its inverse, every op on every shape, and graphs."""
    for tf32, memory in itertools.product((True, False), OURS):
        name = f"training step, {memory}, TF32 {'on' if tf32 else 'off'}"
        yield name, functools.partial(check_step, memory, tf32, device)
    yield "decode(encode(x))", functools.partial(check_inverse, device)
    for shape, form in itertools.product(SHAPES, FORMS):
        yield f"ops, {titled(shape, form)}", functools.partial(check_cases, shape, form, device)
    asked = device.type == "cuda"  # on which alone graphs are captured
    for memory in OURS:
        made = functools.partial(model_and_images, memory, device)
        yield f"CUDA graph of a training step, {memory}", lambda made=made: check_replay(*made(), asked)
    both = "CUDA graphs of training and sampling"
    yield both, lambda: check_together(*model_and_images("store", device), asked)
    yield "broken CUDA graph", functools.partial(check_broken, device)


def unchecked(device: torch.device) -> Iterator[Question]:
    """A training step in two memory modes, then every case."""
    for memory in ("store", "reversible"):
        yield f"training step, {memory}", functools.partial(gradients_of, *model_and_images(memory, device))
    for shape, form in itertools.product(SHAPES, FORMS):
        for case in cases_of(data_of(shape, form).copy(device)):
            yield f"{case.name}, {titled(shape, form)}", lambda build=case.build: build(functional, False)()


def groups(arguments: argparse.Namespace) -> list[Callable[[], Iterable[Question]]]:
    """All checks, or with ``--unchecked`` what runs unchecked."""
    return [functools.partial(unchecked if arguments.unchecked else checks, arguments.device)]


if __name__ == "__main__":
    options = stage_options("gpu_smoke", "first facts")
    options.add_argument("--unchecked", action="store_true", help="run and compare nothing")
    raise SystemExit(run(options, (), groups))
