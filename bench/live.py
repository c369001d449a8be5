"""Flows of projects that people run, before and after ``accelerate``: training step, inference, memory, and errors.

    PYTHONPATH=build/live pyglow-fast bench live [--models a,b] [--precision bf16] [--batch N] [--quick] [--out DIR]

The flow part alone, on random features (bench/live_cases.py). Theirs, and copies of it with the same weights after
``accelerate(model)`` and with memory "store" and "reversible", take turns in one process. A training step is forward
and backward of the mean negative log-likelihood, inference the forward without gradients; an optimizer is no part of
it. With bf16 all are under torch.autocast. Outputs and gradients of every copy are held against theirs in float64: in
float64 they are to agree to 1e-9, in the precision that is measured to be off by at most twice as much as theirs (and
gradients in float32 by what relus do whose arguments have another sign).
Memory is what a training step has alive at its peak besides parameters and gradients (AllocatorTrace of
bench/memory_meter.py). A project that is not installed is left out, by name; a model of which nothing is replaced is a
row that says so.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import live_cases
from bench.harness import device_name, machine, malloc_setting, write_json
from bench.live_cases import MODELS, LiveCase
from bench.live_rows import ACCELERATED, THEIRS, VARIANTS, LiveRow, draw, faults, table
from bench.memory_case import gradient_error
from bench.memory_meter import AllocatorTrace
from bench.models import chosen, take_turns
from bench.precisions import PRECISIONS, autocast
from pyglow_fast.interop import accelerate

CPU = torch.device("cpu")
CHECKED = 2  # samples that outputs and gradients are compared on
QUICK_MODELS = ("fastflow-resnet18", "uflow", "glow-tts", "chaiyujin", "cflow")
QUICK_SHARE = 8  # of a model's own batch
Results = tuple[list[Tensor], list[Tensor]]  # outputs, gradients


@dataclasses.dataclass(frozen=True)
class Copy:
    """A model of one variant, and what accelerate did to it."""

    model: nn.Module
    replaced: int = 0
    joined: int = 0
    left: dict[str, int] = dataclasses.field(default_factory=dict)
    note: str = ""


def copied(model: nn.Module, variant: str) -> Copy:
    """A copy of the model as the variant has it; of theirs, the model itself."""
    if variant == THEIRS:
        return Copy(model)
    twin = copy.deepcopy(model)
    try:
        done = accelerate(twin, None if variant == ACCELERATED else variant)
    except ValueError as error:  # there is no layer that any adapter knows
        return Copy(twin, note=f"nothing replaced: {error}")
    left = dict(collections.Counter(done.left.values()))
    note = "" if done.replaced else "nothing replaced"
    return Copy(twin, len(done.replaced), sum(run["steps"] for run in done.memory_report()), left, note)


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
    """The peak of a training step, but for the gradients of the parameters."""
    step = training_step(case, model, dtype)
    model.zero_grad(set_to_none=True)  # what is freed inside would count less than nothing
    gc.collect()
    with AllocatorTrace() as trace:
        step()
    return trace.peak_without(value.grad for value in model.parameters() if value.grad is not None)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets the dtype of tensors that a model makes itself, as Jet its log-determinant."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def results(case: LiveCase, model: nn.Module, dtype: torch.dtype) -> Results:
    """Latents and log-determinants of the first samples, and the gradients of parameters and data."""
    double = dtype == torch.float64
    features = [value[:CHECKED].to(dtype if double else value.dtype) for value in case.features]
    data = [value.clone().requires_grad_() for value in features[: case.n_data]]
    with _default_dtype(dtype if double else torch.float32):
        with autocast(CPU, torch.float32 if double else dtype):
            latents, log_det = case.call(model, *data, *features[case.n_data :])
        wanted = [*(value for value in model.parameters() if value.requires_grad), *data]
        gradients = torch.autograd.grad(loss_of(latents, log_det), wanted, allow_unused=True)
    filled = [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, gradients, strict=True)]
    return [value.detach() for value in (*latents, log_det)], filled


def errors(found: Results, exact: Results, prefix: str = "") -> dict[str, float]:
    """The relative errors of all outputs together and of all gradients together."""
    parts = zip(("outputs", "gradients"), found, exact, strict=True)
    return {f"{prefix}{name}": gradient_error(values, truth)[0] for name, values, truth in parts}


class Measurement:
    """One model in one precision; ``rows`` has a row of each variant, whatever happens to it."""

    def __init__(self, name: str, precision: str, batch: int | None, rounds: int, seconds: float) -> None:
        self.case, self.dtype = live_cases.build(name, batch), PRECISIONS[precision]
        self.rounds, self.seconds = rounds, seconds
        size = self.case.features[0].shape[0]
        facts = (device_name(CPU), malloc_setting())
        self.rows = {v: LiveRow(name, self.case.source, size, v, precision, *facts) for v in VARIANTS}
        self.copies: dict[str, Copy] = {}

    def run(self) -> list[LiveRow]:
        """Check each variant, then time those that are right and did replace something."""
        double = copy.deepcopy(self.case.model).double()
        exact = results(self.case, double, torch.float64)
        for variant in VARIANTS:
            try:
                self._check(variant, double, exact)
            except Exception as error:  # whatever an adapter does, the other rows are measured
                self._note(variant, f"{type(error).__name__}: {str(error).splitlines()[0]}", wrong=True)
        del double, exact
        self._time()
        return list(self.rows.values())

    def _note(self, variant: str, text: str, wrong: bool = False) -> None:
        self.rows[variant] = dataclasses.replace(self.rows[variant], note=text, wrong=wrong)

    def _check(self, variant: str, double: nn.Module, exact: Results) -> None:
        own = copied(self.case.model, variant)
        facts = {name: getattr(own, name) for name in ("replaced", "joined", "left", "note")}
        self.rows[variant] = dataclasses.replace(self.rows[variant], **facts)
        if variant != THEIRS and not own.replaced:
            return
        found = errors(results(self.case, own.model, self.dtype), exact)
        again = exact if variant == THEIRS else results(self.case, copied(double, variant).model, torch.float64)
        found |= errors(again, exact, "float64 ")
        self.rows[variant] = dataclasses.replace(self.rows[variant], errors=found)
        if text := faults(self.rows[variant], self.rows[THEIRS]):
            self._note(variant, text, wrong=True)
            return
        self.copies[variant] = own

    def _time(self) -> None:
        for call, make in (("train", training_step), ("infer", inference)):
            cases = {name: make(self.case, own.model, self.dtype) for name, own in self.copies.items()}
            for name, values in take_turns(cases, CPU, self.rounds, self.seconds).items():
                low, median, high = statistics.quantiles(values, n=4, method="inclusive")
                measured = {f"{call}_seconds": median, f"{call}_quartiles": (low, high), "rounds": len(values)}
                self.rows[name] = dataclasses.replace(self.rows[name], **measured)
        for name, own in self.copies.items():
            size = activation_bytes(self.case, own.model, self.dtype)
            self.rows[name] = dataclasses.replace(self.rows[name], activation_bytes=size)
            own.model.zero_grad(set_to_none=True)
        base = self.rows[THEIRS]
        for name in self.copies:
            row = self.rows[name]
            quantities = {"train": "train_seconds", "infer": "infer_seconds", "memory": "activation_bytes"}
            ratios = {
                f"{part}_ratio": getattr(base, quantity) / getattr(row, quantity)
                for part, quantity in quantities.items()
                if getattr(row, quantity) > 0  # activations that weigh no more than the gradients are told as none
            }
            self.rows[name] = dataclasses.replace(row, **ratios)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    options = argparse.ArgumentParser(prog="live", description=__doc__.split("\n")[0], allow_abbrev=False)
    options.add_argument("--models", type=chosen(list(MODELS)), help=f"some of {','.join(MODELS)} (all)")
    options.add_argument("--precision", type=chosen(list(PRECISIONS)), help="fp32,bf16 (both) or one of them")
    options.add_argument("--batch", type=int, help="samples, of every model; each has its own by default")
    options.add_argument("--rounds", type=int, help="interleaved rounds (5)")
    options.add_argument("--seconds", type=float, default=15.0, help="of a kind of call; past them 3 rounds do (15)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options.add_argument(
        "--quick",
        action="store_true",
        help=f"by default {','.join(QUICK_MODELS)}, an eighth of the batch, fp32, 3 rounds",
    )
    options.add_argument("--out", type=Path, metavar="DIR", help="folder for live-cpu.json and live-cpu.png")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table of each model and precision, write the files.

    Args:
        argv: the options; those of the process if None.

    Returns:
        0, or 1 if a copy failed or its numbers are not theirs.
    """
    options = parser()
    arguments = options.parse_args(argv)
    quick = arguments.quick
    rounds = arguments.rounds or (3 if quick else 5)
    if rounds < 2 or (arguments.batch is not None and arguments.batch < 1):
        options.error("expected 2 rounds or more and a batch of 1 or more")
    torch.set_num_threads(arguments.threads)
    facts = machine(CPU) | {"threads": str(arguments.threads), "rounds": str(rounds)}
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    rows: list[LiveRow] = []
    notes: list[str] = []
    for name in arguments.models or (QUICK_MODELS if quick else MODELS):
        batch = arguments.batch or (max(1, MODELS[name][1] // QUICK_SHARE) if quick else None)
        for precision in arguments.precision or (["fp32"] if quick else PRECISIONS):
            try:
                measurement = Measurement(name, precision, batch, rounds, arguments.seconds)
            except ImportError as error:
                notes.append(f"{name} is left out: {error} (make test-live installs it)")
                print(notes[-1], flush=True)
                break
            found = measurement.run()
            print(table(found), flush=True)
            rows += found
            if arguments.out is not None:  # after each, so that a run that is stopped leaves what it has
                arguments.out.mkdir(parents=True, exist_ok=True)
                write_json(arguments.out / "live-cpu.json", facts, rows, notes=notes)
    if arguments.out is not None and rows:
        print(draw(rows, arguments.out / "live-cpu.png"))
    wrong = [f"{row.model}, {row.variant}, {row.precision}: {row.note}" for row in rows if row.wrong]
    print("\n".join(f"wrong: {line}" for line in wrong) or "all copies give the numbers of theirs")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
