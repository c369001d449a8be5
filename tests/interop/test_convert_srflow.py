"""Checkpoints of SRFlow's interface, there and back. Their latents and log-dets are those of the golden files."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.gradients import perturbed
from support.helpers import assert_close
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import presets
from pyglow_fast.interop.convert import level_features, load_srflow, save_srflow

FEATURES, SIDE = 5, 16
# Presets, and what is changed of them besides size, K and widths.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "4x": ("srflow4x", {}),
    "8x": ("srflow8x", {}),
    "llflow": ("llflow", {}),
    "conditional splits": ("llflow", {"n_splits": 2, "cond_splits": True, "split_ratio": 0.25}),
    "no transitions": ("srflow4x", {"n_levels": 2, "n_transitions": 0}),
}
PREFIX = "flowUpsamplerNet."


def model_of(name: str) -> pgf.Glow:
    preset, fields = CASES[name]
    n_levels = fields.get("n_levels", presets.find(preset).settings["n_levels"])
    widths = {"image_shape": (3, SIDE, SIDE), "n_steps": 2, "hidden": 6, "cond_channels": (FEATURES,) * n_levels}
    model = pgf.Glow(pgf.GlowConfig.preset(preset, **widths, **fields)).double()
    model.initialize(*inputs(n_levels, n=32))  # of few, scales at the deepest level would be extreme
    return perturbed(model, 0.05).eval()


def inputs(n_levels: int, side: int = SIDE, n: int = 2) -> tuple[Tensor, list[Tensor]]:
    x = torch.rand(n, 3, side, side, dtype=torch.float64) - 0.5
    sizes = [side >> (level + 1) for level in range(n_levels)]
    return x, [torch.randn(n, FEATURES, size, size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_loaded_as_the_same_model(name: str) -> None:
    model = model_of(name)
    state = save_srflow(model)
    # In their files the encoder's weights and a convolution that is never used are too.
    beside = {"RRDB.conv_first.weight": torch.zeros(2, 3, 3, 3), PREFIX + "f.0.weight": torch.zeros(4)}
    again = load_srflow({**state, **beside}, SIDE)
    assert again.config == model.config
    assert presets.find(CASES[name][0]).settings["cond_channels"][0] == 320
    x, features = inputs(model.config.n_levels)
    noise = model.to_noise(x, cond=features)[0]
    assert all(map(torch.equal, again.to_noise(x, cond=features)[0], noise))
    assert_close(again.from_noise(noise, cond=dict(enumerate(features)))[0], x, 1e4)
    saved = save_srflow(again)
    torch.testing.assert_close(saved, state, rtol=0, atol=0)


def test_another_size_shares_the_weights() -> None:
    ours = model_of("4x")
    x, features = inputs(3, side=24)
    wide = pgf.Glow(dataclasses.replace(ours.config, image_shape=(3, 24, 24)))
    expected = load_srflow(save_srflow(ours), image_size=24)
    wide.load_state_dict(ours.state_dict(), assign=True)
    assert_close(wide.log_prob(x, cond=features), expected.log_prob(x, cond=features), 1e4)
    places = [[value.data_ptr() for value in own.parameters()] for own in (wide, ours)]
    assert places[0] == places[1]


def test_features_by_level() -> None:
    names = ["fea_up-1", "fea_up0", "fea_up1", "fea_up2", "fea_up4"]
    features = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}

    def picked(scale: int, n_levels: int) -> list[str]:
        return [names[int(value)] for value in level_features(features, scale, n_levels)]

    assert picked(4, 3) == picked(1, 3) == ["fea_up2", "fea_up1", "fea_up0"]
    assert picked(8, 4) == ["fea_up4", "fea_up2", "fea_up1", "fea_up0"]
    assert picked(4, 4) == ["fea_up2", "fea_up1", "fea_up0", "fea_up-1"]
    with pytest.raises(ValueError, match="features: expected a tensor 'fea_up8'"):
        level_features(features, 16, 3)
    with pytest.raises(ValueError, match="scale: expected 1, 4, 8 or 16, found 3"):
        level_features(features, 3, 3)
    with pytest.raises(ValueError, match="features: expected a tensor 'fea_up-2'"):
        level_features(features, 4, 5)


def test_what_does_not_fit_is_refused() -> None:
    state = save_srflow(model_of("4x"))
    with pytest.raises(ValueError, match=r"affine\.fCurve\.0\.weight: expected no tensor of that name"):
        load_srflow({**state, PREFIX + "layers.3.affine.fCurve.0.weight": torch.zeros(2)}, 16)
    for name in ("layers.3.affine.fFeatures.2.actnorm.logs", "layers.1.invconv.weight", "layers.5.conv.logs"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            load_srflow({key: value for key, value in state.items() if key != PREFIX + name}, 16)
    uneven = {key: value for key, value in state.items() if not key.startswith(PREFIX + "layers.4.affine")}
    with pytest.raises(ValueError, match=r"flowUpsamplerNet\.layers\.\d+\.[\w.]+: expected "):
        load_srflow(uneven, 16)
    with pytest.raises(ValueError, match=r"flowUpsamplerNet\.layers: expected levels of a squeeze and steps"):
        load_srflow({"RRDB.weight": torch.zeros(2)}, 16)


def test_what_they_do_not_have_is_not_saved() -> None:
    fields: dict[str, Any]
    for fields in ({"n_classes": 3}, {"border": True}, {"injector": False}, {"learn_top": True}, {}):
        model = pgf.Glow(pgf.GlowConfig.preset("llflow", image_shape=(3, 8, 8), n_steps=1, hidden=2, **fields))
        expected = f"{next(iter(fields))}: expected" if fields else "model: expected actnorms that have seen data"
        with pytest.raises(ValueError, match=expected):
            save_srflow(model)
