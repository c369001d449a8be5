"""Small runs of FlowSteps, and who executes them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.functional import ops
from pyglow_fast.runs import compiled, python
from support.gradients import SHAPE, ready

ONE_PART, EVERY_STEP = 2**60, 0  # limits of a part's gradients


def cut_parts(patch: pytest.MonkeyPatch, limit: int, steps: int = 0) -> None:
    """Let runs that begin from now on have parts of ``limit`` bytes, or of ``steps``, if their parameters allow."""
    found = (lambda _, step_bytes, *rest: steps * max(step_bytes)) if steps else (lambda *_: limit)
    for module in (python, compiled):
        patch.setattr(module, "part_limit", found)


def only_python(patch: pytest.MonkeyPatch) -> None:
    """Let Python execute all runs, as where there is no extension."""
    patch.setattr(ops, "is_runnable", lambda x: False)


def chain(depth: int, cond: Tensor | None = None, **options: Any) -> pgf.ReversibleSequence:
    """A run of FlowSteps, reversible. ``cond`` is that of 64 samples; ``options`` are the sequence's."""
    cond_channels = 0 if cond is None else cond.shape[1]
    steps = [pgf.FlowStep(SHAPE[0], 5, cond_channels=cond_channels) for _ in range(depth)]
    return ready(steps, SHAPE, cond, memory="reversible", **options)
