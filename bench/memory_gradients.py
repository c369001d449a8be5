"""Gradients of the memory modes against float64: of trained weights, and of steps that are hard to invert.

The exact gradient is that of the same float32 weights and data by plain torch in float64, through the reference. Beside
ours and memcnn there is the reversible backward almost without its control ("no tolerance": no anchors, and nothing is
redone but for NaN). Where even stored float32 has lost the gradient (weights of 0.1 in place of 0.05), nothing is told.

A hidden value within rounding of zero falls on the other side of the ReLU in one of two equally good computations,
which changes a gradient by far more than rounding: single batches differ tenfold by such chance. The median over
batches counts.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.memory_case import gradient_error, training_step
from bench.memory_models import OURS, PlainStep, Shape, build, images, memcnn_step, plain_levels
from pyglow_fast import FlowStep, Glow, ReversibleSequence

ALLOWED_RATIO = 2.0  # of the error of stored float32
BATCHES = 5
WARM = 8  # backward passes on the same weights before the control is judged: it adapts in them
TRAINED = Shape((3, 32, 32), 3, 32, 64, 8)
# Steps, standard deviation of the nets' last weights.
ILL_CONDITIONED = ((32, 0.0275), (64, 0.0275), (64, 0.03), (32, 0.05))
Loss = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class GradientRow:
    """Errors of one implementation, medians over batches; ``ratio``s to those of stored float32; what the control did.

    ``error_first`` is that of the first pass of all, when the spacing was still the initial one.
    """

    case: str
    implementation: str
    error: float
    worst_tensor: float
    ratio: float
    ratio_worst_tensor: float
    error_first: float = 0.0
    passes: int = 1
    steps: int = 0
    spacing: tuple[int, ...] = ()  # by level, at the end
    largest_drift: float = 0.0
    trips: int = 0
    redone_steps: int = 0

    @property
    def within(self) -> bool:
        """Whether it is as good as promised."""
        return self.ratio <= ALLOWED_RATIO and self.ratio_worst_tensor <= ALLOWED_RATIO

    @property
    def reversible(self) -> bool:
        """Whether it ended with states that are recomputed: not by anchors at every step, nor by redoing all."""
        return self.steps > 0 and max(self.spacing) > 1 and self.redone_steps < self.steps * self.passes


def brief_training(device: torch.device, steps: int) -> tuple[Glow, list[Tensor]]:
    """A Glow after some steps of Adam on smooth images, and batches of them."""
    model = build("reversible", TRAINED, "auto", device)
    assert isinstance(model, Glow)
    x = images(dataclasses.replace(TRAINED, batch=64), device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(len(x), (TRAINED.batch,), generator=generator)
        optimizer.zero_grad()
        (-model.log_prob(x[chosen]) / model.config.n_values).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, list(x.split(TRAINED.batch)[:BATCHES])


def saved_run(path: Path, device: torch.device) -> tuple[Glow, list[Tensor]]:
    """The model of a run folder and batches of smooth images of its shape."""
    from pyglow_fast.train.run_folder import RunFolder, load_model

    model = load_model(RunFolder(path).load(), str(path), device)
    config = model.config
    shape = Shape(config.image_shape, config.n_levels, config.n_steps, config.hidden, BATCHES * TRAINED.batch)
    return model, list(images(shape, device).split(TRAINED.batch))


def hard_steps(n_steps: int, size: float, device: torch.device) -> tuple[ReversibleSequence, list[Tensor]]:
    """Random steps of 12 channels whose nets put out large values, and batches."""
    torch.manual_seed(0)
    steps = []
    for _ in range(n_steps):
        step = FlowStep(12, hidden=32)
        with torch.no_grad():
            for parameter in (step.coupling.net.conv3.weight, step.coupling.net.conv3.bias):  # type: ignore[union-attr]
                parameter.normal_(std=size)  # type: ignore[operator]
            step.actnorm.log_scale.normal_(std=0.1)
            step.actnorm.bias.normal_(std=0.3)
            step.actnorm.initialized.fill_(True)
        steps.append(step)
    return ReversibleSequence(steps).to(device), [torch.randn(4, 12, 16, 16).to(device) for _ in range(BATCHES)]


class _Sequence(nn.Module):
    """-0.5 |z|^2 + log_det of steps run one by one or as they come."""

    def __init__(self, owned: nn.Module, run: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.owned = owned
        self._run = run

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,), up to a constant."""
        z, log_det = self._run(x)
        return log_det - 0.5 * z.square().flatten(1).sum(1)


def _variant(base: Glow | ReversibleSequence, implementation: str) -> nn.Module:
    """A copy of the model that runs as an implementation; its parameters come in the same order."""
    model = copy.deepcopy(base)
    sequences = [part for part in model.modules() if isinstance(part, ReversibleSequence)]
    if implementation in OURS or implementation == "no tolerance":
        for sequence in sequences:
            sequence.memory = implementation if implementation in OURS else "reversible"
            control = type(sequence.control)
            if implementation == "no tolerance":
                sequence.control = control(len(sequence), None, float("inf"))
            else:
                sequence.control = control(len(sequence))
        return model if isinstance(model, Glow) else _Sequence(model, model)
    if isinstance(model, Glow):
        return plain_levels(model, implementation)
    plain = [PlainStep(step) for step in model.flow_steps()]
    steps = [memcnn_step(step) for step in plain] if implementation == "memcnn" else plain

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for step in steps:
            x, log_det = step(x)
            total = total + log_det
        return x, total

    return _Sequence(model, run)


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    training_step(model, x)()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _errors(
    model: nn.Module, batches: Sequence[Tensor], exact: Sequence[Sequence[Tensor]], warm: int
) -> tuple[float, float, float]:
    """Medians of relative L2 and worst tensor over the batches, after ``warm`` passes; L2 of the first pass."""
    first = gradient_error(_gradients(model, batches[0]), exact[0])[0]
    for index in range(1, warm):
        training_step(model, batches[index % len(batches)])()
    found = [gradient_error(_gradients(model, x), truth) for x, truth in zip(batches, exact, strict=True)]
    columns = torch.tensor(found, dtype=torch.float64).median(0).values.tolist()  # median passes NaN on
    return columns[0], columns[1], first


def compare(name: str, base: Glow | ReversibleSequence, batches: Sequence[Tensor]) -> Iterator[GradientRow | str]:
    """A row for each implementation, or a line on why there is none."""
    exact_model = _variant(base, "plain").double()
    exact = [_gradients(exact_model, x.double()) for x in batches]
    stored = (0.0, 0.0)
    for implementation in ("store", "checkpoint", "reversible", "no tolerance", "plain", "memcnn"):
        try:
            model = _variant(base, implementation)
        except ImportError as missing:
            yield f"{implementation} is left out: {missing}"
            continue
        warm = WARM if implementation == "reversible" else 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # frequent redos are reported here
            try:
                error, worst, first = _errors(model, batches, exact, warm)
            except (RuntimeError, ValueError) as refusal:
                yield f"{name}, {implementation}: {str(refusal).splitlines()[0]}"
                continue
        if implementation == "store":
            stored = (error, worst)
        row = GradientRow(name, implementation, error, worst, error / stored[0], worst / stored[1], first)
        if implementation in ("reversible", "no tolerance"):
            row = dataclasses.replace(row, **_control(model, warm + len(batches)))
        yield row


def _control(model: nn.Module, passes: int) -> dict[str, Any]:
    reports = [part.memory_report() for part in model.modules() if isinstance(part, ReversibleSequence)]
    drifts = torch.tensor([report["largest_drift"] for report in reports])
    return {
        "passes": passes,
        "steps": sum(report["steps"] for report in reports),
        "spacing": tuple(report["anchor_every"] for report in reports),
        "largest_drift": float(drifts.amax()),
        "trips": sum(report["trips"] for report in reports),
        "redone_steps": sum(report["redone_steps"] for report in reports),
    }


def measure(device: torch.device, run: Path | None, training: int, quick: bool = False) -> Iterator[GradientRow | str]:
    """All cases: rows, and lines on what is left out.

    Args:
        device: where.
        run: the folder of a trained run; None: a model is trained briefly.
        training: steps of that.
        quick: one case of steps that are hard to invert, alone.
    """
    if quick:
        n_steps, size = ILL_CONDITIONED[0]
        yield from compare(f"strongly scaled nets ({size}), K={n_steps}", *hard_steps(n_steps, size, device))
        return
    base, batches = brief_training(device, training) if run is None else saved_run(run, device)
    name = f"trained {training} steps" if run is None else "trained"
    yield from compare(f"{name}, K={base.config.n_steps}, L={base.config.n_levels}", base, batches)
    for n_steps, size in ILL_CONDITIONED:
        yield from compare(f"strongly scaled nets ({size}), K={n_steps}", *hard_steps(n_steps, size, device))


def table(rows: Sequence[GradientRow]) -> str:
    """Errors, their ratios to stored float32, and the control."""
    lines = [
        f"{'gradients against float64':38} {'':12} {'relative L2':>11} {'worst tensor':>12} {'/ stored':>15}"
        f"  spacing, largest drift, trips, redone of all"
    ]
    for row in rows:
        ratios = f"{row.ratio:.3g} / {row.ratio_worst_tensor:.3g}"
        line = f"{row.case:38} {row.implementation:12} {row.error:11.2e} {row.worst_tensor:12.2e} {ratios:>15}"
        if row.steps:
            spacing = "/".join(map(str, row.spacing))
            line += f"  {spacing}, {row.largest_drift:.1e}, {row.trips}, {row.redone_steps}/{row.steps * row.passes}"
            line += "" if row.reversible else " (not by inversion)"
        lines.append(line)
    return "\n".join(lines)
