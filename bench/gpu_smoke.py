"""The first facts of a device, in seconds: every op, a training step in each memory mode, and a CUDA graph of one.

    python -m bench.gpu_smoke [--device cuda] [--unchecked ops|all] [--out FILE]

Each check prints a line and goes on after a failure, since the next one tells something else; the file is written anew
after each. An op runs on small shapes with ragged ends, forward, backward and inverse, the net's output in float32 and
in bfloat16, in either layout. A result may be off by twice what plain torch on the CPU is off by in float32, both
against float64, and by a few roundings of the largest value. ``--unchecked`` runs the ops, or all but the graphs, and
compares nothing: it is what compute-sanitizer watches.
"""

from __future__ import annotations

import argparse
import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import precisions
from bench.cases import Case, Data, kernel_cases, matrix_cases
from bench.gpu_stages import NO_KERNELS
from bench.harness import device_name, machine, synchronize, write_json
from bench.memory_case import gradient_error
from bench.memory_models import RAW_SIZE, wake
from bench.model_checks import FLOAT_TOLERANCES
from pyglow_fast import Glow, _backend, functional, reference

# Shapes with channels that 4 divides and others, H != W, ends of tiles and vectors that are not full, a single
# position.
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
IMAGE, LEVELS, STEPS, HIDDEN, BATCH = (3, 8, 8), 2, 2, 16, 4
ROUND_TRIP = 1e-4  # of values of about 1 through four steps and back
MODES = ("store", "checkpoint", "reversible")

Check = tuple[str, Callable[[], str]]


class Failed(Exception):
    """Raised when a check ran and did not hold."""


def hold(found: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """Compares results with plain torch's, both against float64; tells the largest error in words.

    Raises:
        Failed: a result is off by more than twice plain torch's error and ROUNDINGS of its largest value, or NaN.
    """
    worst = 0.0
    for index, (value, beside, truth) in enumerate(zip(found, plain, exact, strict=True)):
        size = float(truth.detach().abs().max())
        errors = [float((x.detach().cpu().double() - truth.detach()).abs().max()) for x in (value, beside)]
        eps = max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps)  # moments of float32 are in float64
        bound = 2.0 * errors[1] + ROUNDINGS * eps * size
        if not errors[0] <= bound:  # also NaN
            raise Failed(f"output {index} is off by {errors[0]:.1e}, plain torch by {errors[1]:.1e}, of {size:.1e}")
        worst = max(worst, errors[0] / max(size, 1e-30))
    return f"off by {worst:.1e} of the largest value at most"


def data_of(shape: tuple[int, ...], form: str) -> Data:
    """The tensors of a shape on the CPU, the net's output in one of FORMS."""
    data, (dtype, layout) = Data(shape, CPU), FORMS[form]
    data.net_out = data.net_out.to(dtype=dtype, memory_format=layout)
    return data


def cases_of(data: Data) -> list[Case]:
    """Every op that has a CUDA kernel, and the flow step outside its net."""
    return [*kernel_cases(data), *matrix_cases(data)]


def op_checks(device: torch.device, shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)) -> Iterator[Check]:
    """Checks every case on every shape against the reference in float64 on the CPU."""
    for shape in shapes:
        for form in FORMS:
            data = data_of(shape, form)
            triples = zip(
                *(cases_of(d) for d in (data.copy(device), data, data.copy(dtype=torch.float64))), strict=True
            )
            for case, plain, exact in triples:

                def check(case: Case = case, plain: Case = plain, exact: Case = exact) -> str:
                    found = case.build(functional, False)()
                    synchronize(device)
                    return hold(found, plain.build(reference, False)(), exact.build(reference, False)())

                yield f"{case.name} {'x'.join(map(str, shape))}, net's output {form}", check


def small_model(memory: str) -> tuple[Glow, Tensor]:
    """A Glow of two levels on the CPU whose nets put out something, and images for it."""
    torch.manual_seed(0)
    model = Glow(image_shape=IMAGE, n_levels=LEVELS, n_steps=STEPS, hidden=HIDDEN, memory=memory)
    x = torch.rand(BATCH, *IMAGE) - 0.5
    wake(model)
    model.initialize(x)
    return model, x


def gradients_of(model: Glow, x: Tensor) -> list[Tensor]:
    """The gradients of the mean of -log_prob, parameter by parameter."""
    return list(torch.autograd.grad(-model.log_prob(x).mean(), list(model.parameters())))


def model_checks(device: torch.device) -> Iterator[Check]:
    """Checks a training step in each memory mode against float64, TF32 off and on; then x from its latents."""

    def step(memory: str, tf32: bool) -> str:
        model, x = small_model(memory)
        exact = gradients_of(copy.deepcopy(model).double(), x.double())
        with precisions.tf32(tf32):
            found = gradients_of(model.to(device), x.to(device))
        error, worst = gradient_error([gradient.cpu() for gradient in found], exact)
        limit = FLOAT_TOLERANCES.gradients
        if tf32:
            rounded = precisions.flow_gradient_error(LEVELS * STEPS, RAW_SIZE, precisions.TF32_UNIT)
            limit += precisions.MARGIN * rounded
        if not error <= limit:
            raise Failed(f"gradients are off by {error:.1e}, more than {limit:.1e}")
        return f"gradients off by {error:.1e}, one tensor by {worst:.1e}; {model.memory_report()[0]}"

    def round_trip() -> str:
        model, x = small_model("store")
        model, x = model.to(device), x.to(device)
        with torch.no_grad():
            back = model.decode(model.encode(x))
        error = float((back - x).abs().max())
        if not error <= ROUND_TRIP:
            raise Failed(f"decode(encode(x)) is off by {error:.1e}")
        return f"off by {error:.1e}"

    for memory in MODES:
        yield f"training step, {memory}", lambda memory=memory: step(memory, False)  # type: ignore[misc]
    for memory in MODES:
        yield f"training step with TF32, {memory}", lambda memory=memory: step(memory, True)  # type: ignore[misc]
    yield "decode(encode(x))", round_trip


def graph_checks() -> Iterator[Check]:
    """Checks a captured training step, replayed on other images, against the eager one."""

    def check(memory: str) -> str:
        model, x = small_model(memory)
        model, x = model.cuda(), x.cuda()
        with precisions.tf32(False):
            graphs = model.make_graphed(x)
            other = x.flip(0).roll(1, dims=-1)
            expected_loss = float(-model.log_prob(other).mean())
            expected = gradients_of(model, other)
            losses = [float(graphs.train_step(other)) for _ in range(2)]
            found = [parameter.grad for parameter in model.parameters()]
        if any(not abs(loss - expected_loss) <= 1e-4 * max(1.0, abs(expected_loss)) for loss in losses):
            raise Failed(f"losses of two replays are {losses}, the eager one is {expected_loss}")
        assert all(gradient is not None for gradient in found)
        error, _ = gradient_error([g for g in found if g is not None], [g.double() for g in expected])
        if not error <= FLOAT_TOLERANCES.gradients:
            raise Failed(f"gradients of a replay are off by {error:.1e}")
        return f"gradients of a replay off by {error:.1e}; {model.memory_report()[0]}"

    for memory in MODES:
        yield f"CUDA graph of a training step, {memory}", lambda memory=memory: check(memory)  # type: ignore[misc]


def run_checks(checks: Iterator[Check], written: Callable[[list[dict[str, object]]], None]) -> list[dict[str, object]]:
    """Runs the checks; a row for each, and ``written(rows)`` is called after each."""
    rows: list[dict[str, object]] = []
    for name, check in checks:
        try:
            row = {"check": name, "passed": True, "text": check()}
        except Failed as error:
            row = {"check": name, "passed": False, "text": str(error)}
        except Exception:  # whatever is raised is what this is for
            row = {"check": name, "passed": False, "text": traceback.format_exc(limit=-3)[-1500:]}
        rows.append(row)
        print(f"{'passed' if row['passed'] else 'FAILED'} {name}: {row['text']}", flush=True)
        written(rows)
    return rows


def watched(device: torch.device, what: str) -> None:
    """Run every case, and of "all" a training step in two memory modes, too; compare nothing."""
    for shape in SHAPES:
        for form in FORMS:
            for case in cases_of(data_of(shape, form).copy(device)):
                case.build(functional, False)()
                synchronize(device)  # so that a fault is told of the case whose it is
                print(case.name, shape, form, flush=True)
    for memory in ("store", "reversible") if what == "all" else ():
        model, x = small_model(memory)
        gradients_of(model.to(device), x.to(device))
        synchronize(device)
        print("training step,", memory, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print a line each, write the file.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0; 1 if a check failed; NO_KERNELS if there are none for the device.
    """
    options = argparse.ArgumentParser(prog="bench gpu_smoke", description="first facts", allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    options.add_argument("--unchecked", choices=["ops", "all"], help="run them and compare nothing")
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    arguments = options.parse_args(argv)
    device, out = arguments.device, arguments.out
    if not Case.is_ours(device):
        print(f"there are no compiled kernels for {device.type} here: {_backend.reason() or 'it is not built for it'}")
        return NO_KERNELS
    if arguments.unchecked is not None:
        watched(device, arguments.unchecked)
        return 0
    facts = machine(device)
    print(device_name(device), facts, flush=True)

    def checks() -> Iterator[Check]:
        yield from op_checks(device)
        yield from model_checks(device)
        if device.type == "cuda":
            yield from graph_checks()
        else:
            print("skipped CUDA graphs: they are captured on a GPU alone")

    def write(rows: list[dict[str, object]]) -> None:
        if out is not None:
            write_json(out, facts, rows)

    rows = run_checks(checks(), write)
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
