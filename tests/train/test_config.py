"""TrainConfig: JSON and back, refusals, and what a resumed run may change."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "sgd"}, r"optimizer: expected one of \('adam', 'adamw', 'adamax'\), found 'sgd'"),
        ({"lr": 0.0}, "lr: expected a positive number, found 0.0"),
        ({"lr": float("nan")}, "lr: expected a positive number, found nan"),
        ({"lr": "fast"}, "lr: expected a positive number, found 'fast'"),
        ({"clip_norm": -1.0}, "clip_norm: expected a positive number, or none, found -1.0"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number, 0 or more, found -0.1"),
        (
            {"weight_decay": 0.1, "optimizer": "adamax"},
            r"weight_decay: expected 0 with optimizer 'adamax' \(adamw has it\), found 0.1",
        ),
        ({"weight_decay": 0.1}, r"weight_decay: expected 0 with optimizer 'adam' \(adamw has it\), found 0.1"),
        *(
            (
                {"memory": memory},
                r'memory: expected one of \("reversible", "checkpoint", "store"\) or bytes such as "4GB", found '
                + re.escape(repr(memory)),
            )
            for memory in ("disk", "4XB", "", "0GB", "-4GB", 0, -1, 0.5, float("nan"), float("inf"), True, None)
        ),
        ({"precision": "int8"}, "precision: expected one of .*, found 'int8'"),
        ({"compile": 1}, "compile: expected true or false, found 1"),
        ({"ema_decay": 1.0}, "ema_decay: expected a number between 0 and 1, or none, found 1.0"),
        ({"ema_decay": 0.0}, "ema_decay: expected a number between 0 and 1, or none, found 0.0"),
        ({"accumulate": 0}, "accumulate: expected a positive whole number, found 0"),
        ({"accumulate": 5}, "accumulate: expected a divisor of batch_size, 64, found 5"),
        ({"workers": -1}, "workers: expected a whole number, 0 or more, or none, found -1"),
        ({"patience": 0}, "patience: expected a positive whole number, or none, found 0"),
        ({"keep": 0}, "keep: expected a positive whole number, found 0"),
        ({"max_skipped": -1}, "max_skipped: expected a whole number, 0 or more, found -1"),
        ({"check_ranks_every": 0}, "check_ranks_every: expected a positive whole number, found 0"),
        (
            {"cuda_graphs": True, "accumulate": 2},
            "cuda_graphs: expected no accumulation and no torch.compile beside it, found one of them",
        ),
        ({"warmup_steps": -1}, "warmup_steps: expected a whole number, 0 or more, found -1"),
        ({"threads": 0}, "threads: expected a positive whole number, or none, found 0"),
        ({"decay_steps": 0}, "decay_steps: expected a positive whole number, or none, found 0"),
        ({"batch_size": 0}, "batch_size: expected a positive whole number, found 0"),
        ({"batch_size": 2.5}, "batch_size: expected a positive whole number, found 2.5"),
        ({"batch_size": True}, "batch_size: expected a positive whole number, found True"),
        ({"max_steps": 0}, "max_steps: expected a positive whole number, or none, found 0"),
        ({"max_epochs": -1}, "max_epochs: expected a positive whole number, or none, found -1"),
        ({"max_minutes": 0}, "max_minutes: expected a positive number, or none, found 0"),
        ({"max_steps": None}, "max_steps: expected a limit, or max_epochs or max_minutes, found none"),
        ({"seed": -1}, "seed: expected a whole number, 0 or more, found -1"),
        ({"device": "gpu"}, r"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found 'gpu'"),
        ({"log_every": 0}, "log_every: expected a positive whole number, found 0"),
        ({"eval_every": 0}, "eval_every: expected a positive"),
        ({"save_every": 0}, "save_every: expected a positive"),
        ({"sample_every": 0}, "sample_every: expected a positive"),
        ({"sample_temperature": -1.0}, "sample_temperature: expected a number, 0 or more"),
        ({"class_conditional": True}, "model: expected n_classes exactly if class_conditional, found None"),
        ({"model": GlowConfig(n_classes=2)}, "model: expected n_classes exactly if class_conditional, found 2"),
        ({"class_weight": -0.1}, "class_weight: expected a number, 0 or more, found -0.1"),
        ({"class_weight": "much"}, "class_weight: expected a number, 0 or more, found 'much'"),
        ({"class_weight": float("inf")}, "class_weight: expected a number, 0 or more, found inf"),
        ({"class_weight": 0.01}, "model: expected classify above 0 exactly if class_weight is, found 0"),
        ({"model": GlowConfig(classify=2)}, "model: expected classify above 0 exactly if class_weight is, found 2"),
        (
            {"class_weight": 0.01, "model": GlowConfig(classify=2), "cuda_graphs": True},
            r"cuda_graphs: expected class_weight 0 beside it \(.*\), found 0.01",
        ),
        ({"beta2": 1.0}, "beta2: expected a number from 0 to below 1, found 1.0"),
        ({"beta2": -0.5}, "beta2: expected a number from 0 to below 1, found -0.5"),
        ({"model": GlowConfig(cond_channels=2)}, "model: expected cond_channels=0"),
        ({"model": {"n_levels": 2}}, "model: expected a GlowConfig, found dict"),
        ({"workers": 1025}, r"workers: expected at most 1024 \(each is a process with torch in it\), found 1025"),
        ({"threads": 1_000_000}, r"threads: expected at most 1024 \(torch ends .*\), found 1000000"),
        ({"sample_count": 65537}, r"sample_count: expected at most 65536 \(.*\), found 65537"),
        ({"lr": 1e308}, r"lr: expected at most 1000000 \(float32 has to hold its products\), found 1e\+308"),
        ({"lr": 10**400}, r"lr: expected at most 1000000 \(.*\), found 1000"),
        ({"optimizer": "adamw", "weight_decay": 1e7}, "weight_decay: expected at most 1000000 "),
        ({"class_weight": 1e7}, "class_weight: expected at most 1000000 "),
        ({"clip_norm": 1e39}, r"clip_norm: expected at most 1e\+30 "),
        ({"sample_temperature": 1e39}, r"sample_temperature: expected at most 1e\+30 "),
        (
            {"seed": 2**63},
            r"seed: expected at most 9223372036854775807 \(64 bits hold no more\), found 92233720368547758",
        ),
        (
            {"device": "cuda:9999999999999"},
            "device: expected a number of at most three digits behind 'cuda:', found 'cuda",
        ),
        ({"device": "cuda:\u0663"}, "device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', found "),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "config: expected known keys, found learning_rate"),
        ({"data": {"nam": "digits"}}, "data: expected known keys, found nam"),
        ({"data": 3}, "data: expected a mapping, found int"),
        ({"model": {"depth": 3}}, r"config: expected keys among .*, found unknown \['depth'\]"),
        ([], "config: expected a mapping, found list"),
    ],
)
def test_unknown_keys_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_dict(values)


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
