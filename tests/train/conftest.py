"""Runs that are as small as a run can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train.run_cases import TINY_MODEL, MakeConfig, MakeRun, MakeState

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import Run, TrainConfig, TrainState, start


@pytest.fixture
def tiny_config() -> MakeConfig:
    """TrainConfig of a tiny model; keywords replace its fields. The data's name is not looked at: tests pass images."""

    def make(**fields: Any) -> TrainConfig:
        values = {
            "data": DataConfig("digits", held_out=0.25),
            "model": GlowConfig(**TINY_MODEL),
            "batch_size": 8,
            "init_images": 16,
            "max_steps": 12,
            "lr": 1e-3,
            "ema_decay": 0.999,
            "warmup_steps": 4,
            "log_every": 2,
            "eval_every": 4,
            "save_every": 3,
            "sample_every": 6,
            "eval_images": 8,
            "sample_count": 4,
            "device": "cpu",
        }
        return TrainConfig(**(values | fields))

    return make


@pytest.fixture
def tiny_images(monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """40 images of 4x4 with 5 grey levels, which also take the place of whatever a configuration names."""
    generator = torch.Generator().manual_seed(1)
    ramp = torch.arange(4).expand(40, 1, 4, 4)
    pixels = (ramp + torch.randint(2, (40, 1, 4, 4), generator=generator)).to(torch.uint8)
    data = ImageSet("tiny", pixels, 5, torch.arange(40) % 2, ("even", "odd"))
    monkeypatch.setattr("pyglow_fast.train.loop.load_data", lambda config: data)
    return data


@pytest.fixture
def new_run(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> MakeRun:
    """A run of ``tiny_config(**fields)``, ready to be executed, in the folder ``out`` of tmp_path."""

    def make(out: str = "run", images: ImageSet = tiny_images, overwrite: bool = False, **fields: Any) -> Run:
        return start(tiny_config(**fields), str(tmp_path / out), overwrite, images)

    return make


@pytest.fixture
def new_state(tiny_config: MakeConfig, tiny_images: ImageSet) -> MakeState:
    """The state that trains ``tiny_config(**fields)``, initialised."""

    def make(images: ImageSet = tiny_images, **fields: Any) -> TrainState:
        state = TrainState(tiny_config(**fields), images)
        state.initialize()
        return state

    return make
