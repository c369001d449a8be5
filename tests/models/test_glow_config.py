"""GlowConfig: plain data that goes through JSON, and refuses what no model can be built from."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

import pyglow_fast as pgf

OTHER_VALUES: dict[str, Any] = {
    "image_shape": (1, 16, 8),
    "n_levels": 2,
    "n_steps": 5,
    "hidden": 64,
    "coupling": "additive",
    "permutation": "shuffle",
    "n_classes": 10,
    "cond_channels": 3,
    "net_actnorm": True,
    "scale_map": "tanh",
    "scale_bias": 1.5,
    "scale_eps": 0.1,
    "scale_clamp": 1.0,
    "border": True,
    "classify": 10,
    "injector": True,
    "n_transitions": 2,
    "n_splits": 0,
    "split_ratio": 0.25,
    "cond_splits": True,
    "learn_top": False,
}
# Which other maps, models with injectors, and priors that read a condition have none of.
WITH_SIGMOID = {"scale_factor": 2.0, "n_checkerboard": 2, "n_last_checkerboard": 4, "learn_prior": False}


def test_round_trip_through_json() -> None:
    for config in (pgf.GlowConfig(), pgf.GlowConfig(**OTHER_VALUES), pgf.GlowConfig(**WITH_SIGMOID)):
        again = pgf.GlowConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert hash(again) == hash(config)
        assert isinstance(again.image_shape, tuple)


def test_the_round_trip_covers_every_field() -> None:
    default = pgf.GlowConfig()
    values = OTHER_VALUES | WITH_SIGMOID
    assert set(values) == {field.name for field in dataclasses.fields(default)}
    assert all(getattr(default, name) != value for name, value in values.items())


def test_missing_keys_take_their_defaults() -> None:
    assert pgf.GlowConfig.from_dict({}) == pgf.GlowConfig()
    assert pgf.GlowConfig.from_dict({"n_steps": 4}) == pgf.GlowConfig(n_steps=4)


@pytest.mark.parametrize(
    ("shape", "n_levels", "states"),
    [
        ((3, 32, 32), 3, [(12, 16, 16), (24, 8, 8), (48, 4, 4)]),
        ((1, 8, 4), 2, [(4, 4, 2), (8, 2, 1)]),
        ((5, 2, 6), 1, [(20, 1, 3)]),
        ((2, 8), 3, [(4, 4), (4, 2), (4, 1)]),
        ((1, 4, 4, 8), 2, [(8, 2, 2, 4), (32, 1, 1, 2)]),
    ],
)
def test_level_shapes(shape: tuple[int, ...], n_levels: int, states: list[tuple[int, ...]]) -> None:
    config = pgf.GlowConfig(image_shape=shape, n_levels=n_levels)
    assert config.level_shapes() == states
    assert config.dims == len(shape) - 1
    assert config.n_values == math.prod(shape)


def test_a_last_level_of_checkerboards_has_no_squeeze() -> None:
    config = pgf.GlowConfig(image_shape=(3, 32, 32), n_levels=3, n_checkerboard=1, n_last_checkerboard=4)
    assert config.level_shapes() == [(12, 16, 16), (24, 8, 8), (12, 8, 8)]
    assert [config.squeezes(level) for level in range(3)] == [True, True, False]
    assert pgf.GlowConfig(image_shape=(3, 4), n_levels=1, n_last_checkerboard=1).level_shapes() == [(3, 4)]
