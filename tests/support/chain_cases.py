"""Small runs of steps, their gradients in every memory mode, and what it takes for two gradients to be equal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.reversible import generic, run
from support.bijections import softplus_scale
from support.gradients import CONDITION as CONDITION
from support.gradients import assert_same_gradients as assert_same_gradients
from support.gradients import gradients as gradients
from support.gradients import objective as objective
from support.gradients import perturbed as perturbed
from support.gradients import relative_error as relative_error
from support.gradients import worst_error as worst_error


@dataclass(frozen=True)
class Mode:
    """How a run of steps keeps its states."""

    memory: str
    anchor_every: str | int | None = "auto"
    budget: str | int = "auto"

    def apply(self, sequence: pgf.ReversibleSequence) -> None:
        """Set the mode of the sequence, whose control starts anew."""
        sequence.memory, sequence.memory_budget = self.memory, self.budget
        sequence.control = type(sequence.control)(len(sequence), self.anchor_every, sequence.control.tolerance)


ONE_PART, EVERY_STEP = 2**60, 0  # limits of a part's gradients


def cut_parts(patch: pytest.MonkeyPatch, limit: int, steps: int = 0) -> None:
    """Let runs that begin from now on have parts of ``limit`` bytes, or of ``steps``, if their parameters allow."""
    found = (lambda _, step_bytes, *rest: steps * max(step_bytes)) if steps else (lambda *_: limit)
    for module in (generic, run):
        patch.setattr(module, "part_limit", found)


@dataclass(frozen=True)
class Case:
    """How to build a run of FlowSteps, and the shape that one sample has."""

    name: str
    depth: int = 3
    shape: tuple[int, ...] = (4, 6, 3)
    cond_shape: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def _step(self, k: int, options: dict[str, Any]) -> pgf.FlowStep:
        """The k-th; of a run of checkerboards the parity changes, but for the second step."""
        parity = {"parity": (k - (k > 0)) % 2} if "mask" in options else {}
        return pgf.FlowStep(self.shape[0], **options, **parity)

    def build(self, **sequence_options: Any) -> pgf.ReversibleSequence:
        """Build the run in float64, initialised, away from the start."""
        cond_channels = self.cond_shape[0] if self.cond_shape else 0
        options = {"hidden": 5, "dims": len(self.shape) - 1, "cond_channels": cond_channels, **self.options}
        steps = [self._step(k, options) for k in range(self.depth)]
        sequence = pgf.ReversibleSequence(steps, **sequence_options).double()
        sequence.initialize(*self.batch(64))
        return perturbed(sequence)

    def batch(self, n: int = 3) -> tuple[Tensor, Tensor | None]:
        """Draw a batch (x, cond) of the case's shape."""
        x = torch.randn(n, *self.shape, dtype=torch.float64)
        return x, torch.randn(n, *self.cond_shape, dtype=torch.float64) if self.cond_shape else None


CASES = [
    *(Case(f"depth-{depth}", depth) for depth in (1, 2, 3, 8)),
    *(Case(f"{name}", options={"permutation": name}) for name in ("invconv_plain", "shuffle", "reverse")),
    Case("additive", options={"coupling": "additive"}),
    *(
        Case(f"{scale_map}-{order}", options={"scale_map": scale_map, "order": order})
        for scale_map in ("sigmoid", "exp", "tanh", "atan")
        for order in ("shift_scale", "scale_shift")
    ),
    Case("callable", options={"scale_map": softplus_scale}),
    Case("eps", options={"scale_eps": 0.2}),
    Case("factor", options={"scale_bias": 0.0, "scale_factor": 2.0}),
    Case("net-actnorm", options={"net_actnorm": True}),
    Case("cond", cond_shape=(2, 6, 3)),
    Case("cond-net-actnorm", cond_shape=(1, 6, 3), options={"net_actnorm": True}),
    Case("1d", shape=(4, 7)),
    Case("3d", shape=(2, 5, 2, 3)),
    Case("two-channels", shape=(2, 5, 4)),
    Case("checkerboard", 4, (3, 8, 3), options={"mask": "checkerboard"}),
    Case("checkerboard-additive", 3, (1, 6, 4), options={"mask": "checkerboard", "coupling": "additive"}),
    Case("checkerboard-callable", 3, (2, 6, 2), options={"mask": "checkerboard", "scale_map": softplus_scale}),
    Case("checkerboard-1d", 3, (2, 8), options={"mask": "checkerboard", "permutation": "reverse"}),
    Case("checkerboard-3d", 3, (2, 4, 3, 2), options={"mask": "checkerboard", "net_actnorm": True}),
    Case("checkerboard-cond", 4, (2, 6, 3), (2, 6, 3), options={"mask": "checkerboard"}),
]


@contextmanager
def counted_runs(sequence: nn.Module) -> Iterator[list[str]]:
    """Note the names of the coupling nets in the order in which they run."""
    runs: list[str] = []
    handles = [
        module.net.register_forward_hook(lambda *_, name=name: runs.append(name))
        for name, module in sequence.named_modules()
        if isinstance(module, pgf.Coupling)
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()
