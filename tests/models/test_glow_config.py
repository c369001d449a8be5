"""GlowConfig: plain data that goes through JSON, and refuses what no model can be built from."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from support.covering import pairs

import pyglow_fast as pgf
from pyglow_fast.layers.flow_step import PERMUTATIONS
from pyglow_fast.reference import COUPLINGS, SCALE_MAPS

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


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pgf.GlowConfig().hidden = 3


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


@pairs(
    pytest.mark.parametrize("permutation", PERMUTATIONS),
    pytest.mark.parametrize("scale_map", SCALE_MAPS),
    pytest.mark.parametrize("coupling", COUPLINGS),
)
def test_every_choice_builds_a_model(coupling: str, scale_map: str, permutation: str) -> None:
    fields = {"coupling": coupling, "scale_map": scale_map, "permutation": permutation}
    model = pgf.Glow(image_shape=(1, 2), n_levels=1, n_steps=1, hidden=2, **fields)
    step = model.levels[0].steps[0]
    assert step.coupling.spec.coupling == coupling
    assert step.coupling.spec.scale_map == scale_map


def test_scale_options_reach_the_couplings() -> None:
    config = pgf.GlowConfig(image_shape=(1, 2), n_levels=1, scale_bias=1.25, scale_eps=0.5, scale_clamp=0.75, hidden=2)
    for step in pgf.Glow(dataclasses.replace(config, n_steps=2)).levels[0].steps:
        assert step.coupling.spec[2:5] == (1.25, 0.5, 0.75)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_shape": 32}, "image_shape: expected a tuple of ints, found 32"),
        ({"image_shape": (3,)}, r"image_shape: expected \(C, L\), .* of positive ints, found \(3,\)"),
        ({"image_shape": (3, 8, 8, 8, 8)}, r"image_shape: expected \(C, L\), .* of positive ints"),
        ({"image_shape": (0, 8, 8)}, r"image_shape: expected \(C, L\), .* of positive ints, found \(0, 8, 8\)"),
        ({"image_shape": (3, 8.0, 8)}, r"image_shape: expected \(C, L\), .* of positive ints"),
        ({"image_shape": (3, True, 8)}, r"image_shape: expected \(C, L\), .* of positive ints"),
        ({"image_shape": "3x32x32"}, r"image_shape: expected \(C, L\), .* of positive ints"),
        (
            {"image_shape": (3, 32, 36)},
            r"image_shape: expected sides divisible by 2\^n_levels = 8, found \(3, 32, 36\)",
        ),
        (
            {"image_shape": (3, 36, 32)},
            r"image_shape: expected sides divisible by 2\^n_levels = 8, found \(3, 36, 32\)",
        ),
        ({"n_levels": 6}, r"image_shape: expected sides divisible by 2\^n_levels = 64, found \(3, 32, 32\)"),
        ({"n_levels": 0}, "n_levels: expected a positive whole number, found 0"),
        ({"n_steps": 0}, "n_steps: expected a positive whole number, found 0"),
        ({"n_steps": 10**8}, r"n_steps: expected at most 10000 \(each is some modules .*\), found 100000000"),
        (
            {"n_transitions": 10**8},
            r"n_transitions: expected at most 10000 \(each is some modules .*\), found 100000000",
        ),
        ({"hidden": 65537}, r"hidden: expected at most 65536 \(.*\), found 65537"),
        ({"n_classes": 10**60}, r"n_classes: expected at most 1048576 \(.*\), found 1000"),
        ({"classify": 10**60}, r"classify: expected at most 1048576 \(.*\), found 1000"),
        ({"image_shape": (3, 2**40, 2**40)}, "image_shape: expected .* of positive ints, found"),
        ({"scale_bias": 10**400}, r"scale_bias: expected at most 1e\+30 \(float32 has to hold it\), found 1000"),
        ({"n_steps": 2.0}, r"n_steps: expected a positive whole number, found 2\.0"),
        ({"hidden": -1}, "hidden: expected a positive whole number, found -1"),
        ({"hidden": True}, "hidden: expected a positive whole number, found True"),
        ({"coupling": "linear"}, r"coupling: expected one of \('affine', 'additive'\), found 'linear'"),
        ({"permutation": "none"}, r"permutation: expected one of \('invconv', .*\), found 'none'"),
        ({"n_classes": 0}, "n_classes: expected a positive whole number, or none, found 0"),
        ({"n_classes": "10"}, "n_classes: expected a positive whole number, or none, found '10'"),
        ({"cond_channels": -1}, "cond_channels: expected 0 or a positive int, found -1"),
        ({"cond_channels": None}, "cond_channels: expected 0 or a positive int, found None"),
        ({"n_checkerboard": -1}, "n_checkerboard: expected a whole number, 0 or more, found -1"),
        ({"n_checkerboard": True}, "n_checkerboard: expected a whole number, 0 or more, found True"),
        ({"n_last_checkerboard": 1.0}, r"n_last_checkerboard: expected a whole number, 0 or more, found 1\.0"),
        ({"n_steps": 4, "n_checkerboard": 4}, "n_checkerboard: expected fewer than n_steps = 4, found 4"),
        ({"net_actnorm": "no"}, "net_actnorm: expected true or false, found 'no'"),
        (
            {"cond_splits": True, "cond_channels": 3, "learn_prior": False},
            "cond_splits: expected False, since the model has learn_prior=False, found True",
        ),
        ({"learn_prior": 1}, "learn_prior: expected true or false, found 1"),
        ({"scale_map": "relu"}, r"scale_map: expected one of \('sigmoid', .*\), found 'relu'"),
        ({"scale_map": np.exp}, r"scale_map: expected one of \('sigmoid', .*\), found <ufunc 'exp'>"),
        ({"scale_bias": math.nan}, "scale_bias: expected a finite number, found nan"),
        ({"scale_bias": "2"}, "scale_bias: expected a finite number, found '2'"),
        ({"scale_eps": -0.1}, r"scale_eps: expected a number, 0 or more, found -0\.1"),
        ({"scale_eps": math.inf}, "scale_eps: expected a number, 0 or more, found inf"),
        ({"scale_factor": math.inf}, r"scale_factor: expected a number from 1e-30 to 1e\+30, found inf"),
        ({"scale_factor": 0.0}, r"scale_factor: expected a number from 1e-30 to 1e\+30, found 0\.0"),
        ({"scale_factor": 2.0, "scale_map": "exp"}, "scale_factor: expected 1 where the scale is no sigmoid"),
        ({"scale_factor": 2.0, "coupling": "additive"}, "scale_factor: expected 1 where the scale is no sigmoid"),
        ({"scale_clamp": 0}, "scale_clamp: expected a positive number, at most 80, found 0"),
        ({"scale_clamp": 100.0}, r"scale_clamp: expected a positive number, at most 80, found 100\.0"),
        ({"n_step": 3}, r"config: expected keys among \[.*'n_steps'.*\], found unknown \['n_step'\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgf.GlowConfig.from_dict(fields)
    with pytest.raises(ValueError, match=message):
        pgf.Glow(**fields)


def test_a_config_or_fields_but_not_both() -> None:
    with pytest.raises(
        ValueError, match=r"config: expected a GlowConfig or its fields as keywords, not both, found \["
    ):
        pgf.Glow(pgf.GlowConfig(), n_steps=3)
    with pytest.raises(ValueError, match="config: expected a GlowConfig, found dict"):
        pgf.Glow({"n_steps": 3})
