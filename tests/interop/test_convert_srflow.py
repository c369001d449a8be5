"""Checkpoints of SRFlow's interface: the same latents, images and log-dets, and back again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import assert_close
from support.srflow import FlowUpsamplerNet, randomised
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import presets
from pyglow_fast.interop.convert import level_features, load_srflow, save_srflow

FEATURES = 5
# Their model, and the preset that has its interface.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "4x": ({"L": 3, "n_splits": 1}, "srflow4x"),
    "8x": ({"L": 4, "n_splits": 2}, "srflow8x"),
    "llflow": ({"L": 3, "n_splits": 0}, "llflow"),
    "conditional splits": ({"L": 3, "n_splits": 2, "cond_splits": True, "consume_ratio": 0.25}, ""),
    "no transitions": ({"L": 2, "n_splits": 1, "n_transitions": 0}, ""),
}
PREFIX = "flowUpsamplerNet."


def theirs_of(name: str) -> FlowUpsamplerNet:
    options = {"channels": 3, "hidden": 6, "K": 2, "features": FEATURES, **CASES[name][0]}
    model = randomised(FlowUpsamplerNet(**options).double(), 0.05)
    assert isinstance(model, FlowUpsamplerNet)
    return model


def state_of(model: FlowUpsamplerNet) -> dict[str, Tensor]:
    """As in their files, where the encoder's weights and a convolution that is never used are too."""
    own = {PREFIX + name: value for name, value in model.state_dict().items()}
    return {**own, "RRDB.conv_first.weight": torch.zeros(2, 3, 3, 3), PREFIX + "f.0.weight": torch.zeros(4)}


def inputs(n_levels: int, side: int = 16, n: int = 2) -> tuple[Tensor, list[Tensor]]:
    x = torch.rand(n, 3, side, side, dtype=torch.float64)
    sizes = [side >> (level + 1) for level in range(n_levels)]
    return x, [torch.randn(n, FEATURES, size, size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("name", CASES)
def test_images_come_back_and_what_was_loaded_is_saved_as_it_was(name: str) -> None:
    """Latents and log-dets of two of the cases are in the contract."""
    theirs, (options, preset) = theirs_of(name), CASES[name]
    ours = load_srflow(state_of(theirs), image_size=16)
    if preset:  # at a smaller side, K and widths
        widths = {"hidden": 6, "cond_channels": (FEATURES,) * options["L"]}
        assert ours.config == pgf.GlowConfig.preset(preset, image_shape=(3, 16, 16), n_steps=2, **widths)
        assert presets.find(preset).settings["cond_channels"] == (320,) * options["L"]
    x, features = inputs(options["L"])
    epses, logdet = theirs.encode(x, features)
    noise, _ = ours.to_noise(x, cond=features)
    for found, expected in zip(noise, epses, strict=True):
        assert_close(found, expected, 1e4)
    top = torch.distributions.Normal(0.0, 1.0).log_prob(epses[-1]).sum((1, 2, 3))
    assert_close(ours.log_prob(x, cond=features) - top, logdet, 1e4)
    assert_close(ours.from_noise(noise, cond=dict(enumerate(features)))[0], x, 1e4)
    saved, expected = save_srflow(ours), {PREFIX + key: value for key, value in theirs.state_dict().items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], value) for key, value in expected.items())


def test_another_size_shares_the_weights() -> None:
    theirs = theirs_of("4x")
    ours = load_srflow(state_of(theirs), image_size=16)
    x, features = inputs(3, side=24)
    wide, expected = ours.resized(24, 24), load_srflow(state_of(theirs), image_size=24)
    assert_close(wide.log_prob(x, cond=features), expected.log_prob(x, cond=features), 1e4)
    assert next(wide.parameters()) is next(ours.parameters())
    assert ours.config.image_shape == (3, 16, 16)
    with pytest.raises(ValueError, match="image_shape: expected sides divisible by 2"):
        ours.resized(20, 20)
    with pytest.raises(ValueError, match="spatial: expected 2 sides"):
        ours.resized(16)


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
    state = state_of(theirs_of("4x"))
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


def test_initialised_as_theirs() -> None:
    """The order in which actnorms of steps, injectors and couplings see the first batch is theirs too."""
    theirs = FlowUpsamplerNet(3, 6, 2, 3, FEATURES).double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, 0.0, 0.1)
    ours = load_srflow(state_of(theirs), image_size=16)
    for module in ours.modules():
        if isinstance(module, pgf.ActNorm):
            module.initialized.fill_(False)
            module._known_initialized = False
    x, features = inputs(3, n=4)
    theirs.train().encode(x, features)
    ours.train().initialize(x, features)
    for key, value in save_srflow(ours).items():
        assert_close(value, theirs.state_dict()[key.removeprefix(PREFIX)], 1e3)
