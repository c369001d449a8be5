"""Small runs of FlowSteps, and who executes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import ops
from pyglow_fast.runs import compiled, python
from support.gradients import SHAPE, perturbed

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
