"""TrainConfig: JSON and back, refusals, and what a resumed run may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig
from pyglow_fast.train import TrainConfig


def test_json_round_trip() -> None:
    config = TrainConfig(
        data=DataConfig("folder:x", size=16, gray=True, n_bits=5, split_by="folder", held_out=0.2),
        model=GlowConfig(image_shape=(1, 16, 16), n_levels=2, n_classes=3, classify=3),
        class_conditional=True,
        class_weight=0.01,
        beta2=0.99,
        clip_norm=None,
        max_minutes=1.5,
    )
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("memory", ["4GB", "4 gb", "4000000000", 4_000_000_000, 4e9])
def test_memory_in_bytes(memory: Any) -> None:
    """However it is said: a number of bytes here, a text where people read it."""
    config = TrainConfig(memory=memory)
    assert config == TrainConfig(memory="4GB")
    assert (config.memory, type(config.memory)) == (4_000_000_000, int)
    assert config.to_dict()["memory"] == "4 GB"
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.changes(TrainConfig(memory="4 GB")) == {}
    assert config.changes(TrainConfig()) == {"memory": ("4 GB", "reversible")}


def test_memory_may_change_in_a_resumed_run() -> None:
    config = TrainConfig(memory="store").adjusted(memory="1.5 GiB")
    assert config.memory == 1_610_612_736
    assert config.adjusted(memory=4e9).memory == 4_000_000_000
    assert config.adjusted(log_every=7).memory == 1_610_612_736
    assert config.adjusted(memory="checkpoint").memory == "checkpoint"
    with pytest.raises(ValueError, match=r"^memory: expected one of .*, found '4XB'"):
        config.adjusted(memory="4XB")


def test_adjusted(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(lr=0.5)
    longer = config.adjusted(max_steps=100, lr=0.5, log_every=7)
    assert longer.changes(config) == {"max_steps": (100, 12), "log_every": (7, 2)}
    by_epochs = longer.adjusted(max_epochs=5)
    assert (by_epochs.max_steps, by_epochs.max_epochs, by_epochs.max_minutes) == (None, 5, None)
    both = by_epochs.adjusted(max_steps=7, max_minutes=2.5)
    assert (both.max_steps, both.max_epochs, both.max_minutes) == (7, None, 2.5)
    assert both.adjusted(save_every=1).max_steps == 7
    with pytest.raises(ValueError, match=r"lr: expected 0.5, as the run was started with, found 0.1"):
        config.adjusted(lr=0.1)
