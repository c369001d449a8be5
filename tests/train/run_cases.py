"""What the tests of whole runs share: the smallest model, weights, and things that happen in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyglow_fast.train import Checkpoint, Run, RunFolder, TrainConfig, TrainState

TINY_MODEL: dict[str, Any] = {"image_shape": (1, 4, 4), "n_levels": 1, "n_steps": 2, "hidden": 4}

MakeConfig = Callable[..., TrainConfig]
MakeRun = Callable[..., Run]
MakeState = Callable[..., TrainState]


def weights(run: Path) -> dict[str, Tensor]:
    return Checkpoint.load(RunFolder(run).checkpoint).model


def assert_same_weights(one: Path, other: Path) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def before_step(run: Run, step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once, in the middle of a run."""
    take = run.state.step

    def stepping() -> float:
        if run.state.progress.step == step:
            action()
        return take()

    monkeypatch.setattr(run.state, "step", stepping)
