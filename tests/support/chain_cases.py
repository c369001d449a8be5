"""Small runs of steps, their gradients in every memory mode, and what it takes for two gradients to be equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import ops
from pyglow_fast.runs import compiled, python
from support.gradients import CONDITION as CONDITION
from support.gradients import SHAPE
from support.gradients import assert_same_gradients as assert_same_gradients
from support.gradients import both_ways as both_ways
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
        """Set the mode of the sequence, whose controls start anew."""
        sequence.memory, sequence.memory_budget = self.memory, self.budget
        for name in ("control", "inverse_control"):
            old = getattr(sequence, name)
            setattr(sequence, name, type(old)(len(sequence), self.anchor_every, old.tolerance))


ONE_PART, EVERY_STEP = 2**60, 0  # limits of a part's gradients


def cut_parts(patch: pytest.MonkeyPatch, limit: int, steps: int = 0) -> None:
    """Let runs that begin from now on have parts of ``limit`` bytes, or of ``steps``, if their parameters allow."""
    found = (lambda _, step_bytes, *rest: steps * max(step_bytes)) if steps else (lambda *_: limit)
    for module in (python, compiled):
        patch.setattr(module, "part_limit", found)


def only_python(patch: pytest.MonkeyPatch) -> None:
    """Let Python execute all runs, as where there is no extension."""
    patch.setattr(ops, "is_runnable", lambda x: False)


@dataclass(frozen=True)
class Case:
    """How to build a run of FlowSteps, and the shape that a condition of one sample has."""

    depth: int
    cond_shape: tuple[int, ...] | None = None

    def build(self, **sequence_options: Any) -> pgf.ReversibleSequence:
        """Build the run in float64, initialised, away from the start."""
        cond_channels = self.cond_shape[0] if self.cond_shape else 0
        steps = [pgf.FlowStep(SHAPE[0], 5, cond_channels=cond_channels) for _ in range(self.depth)]
        sequence = pgf.ReversibleSequence(steps, **sequence_options).double()
        sequence.initialize(*self.batch(64))
        return perturbed(sequence)

    def batch(self, n: int = 3) -> tuple[Tensor, Tensor | None]:
        """Draw a batch (x, cond)."""
        x = torch.randn(n, *SHAPE, dtype=torch.float64)
        return x, torch.randn(n, *self.cond_shape, dtype=torch.float64) if self.cond_shape else None
