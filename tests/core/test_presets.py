"""Presets: every one can be built, is what its source says, and gives way to what is said beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import pyglow_fast as pgf
from pyglow_fast import presets
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import TrainConfig, TrainState

NAMES = list(presets.PRESETS)
SMALL = ["digits", "fashion", "emoji32", "photos32"]


def config(name: str, **given: Any) -> TrainConfig:
    """The preset on images that need not be there."""
    preset = presets.find(name)
    data = "digits" if preset.data == "any" else preset.data.replace("PATH", "x")
    return TrainConfig.preset(name, data, **given)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_is_a_model_with_a_density(name: str) -> None:
    found, architecture = config(name), pgf.GlowConfig.preset(name)
    assert found.model == architecture
    preset = presets.find(name)
    if preset.image_shape is not None:
        assert architecture.image_shape == preset.image_shape
        side = found.data.size or 8  # that of the digits
        assert architecture.image_shape[1:] == (side, side)
    known = {item.name for section in (DataConfig, pgf.GlowConfig, TrainConfig) for item in dataclasses.fields(section)}
    assert set(preset.settings) <= known
    fields: dict[str, Any] = {"n_steps": 1 + architecture.n_checkerboard, "hidden": 4}
    model = pgf.Glow(pgf.GlowConfig.preset(name, **fields))
    shrink = 2 ** (found.model.n_levels - (found.model.n_last_checkerboard > 0))
    assert model.latent_shapes[-1][1:] == tuple(side // shrink for side in model.config.image_shape[1:])
    x = torch.rand(2, *model.config.image_shape) - 0.5
    y = None if model.config.n_classes is None else torch.zeros(2, dtype=torch.int64)
    model.initialize(x)
    with torch.no_grad():
        assert model.log_prob(x, y).isfinite().all()
        assert torch.allclose(model.decode(model.encode(x)), x, atol=1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_every_small_preset_takes_a_step(name: str) -> None:
    """On images like its own; narrower nets and fewer images, so that it takes no time."""
    given: dict[str, Any] = {"batch_size": 4, "init_images": 4, "threads": 1, "device": "cpu"}
    found = config(name, hidden=16, **given)
    shape, n_bins = found.model.image_shape, 17 if name == "digits" else 1 << (found.data.n_bits or 8)
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(n_bins, (20, *shape), generator=generator).to(torch.uint8)
    state = TrainState(found, ImageSet(name, levels, n_bins))
    state.initialize()
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    value = state.step()
    assert 0.5 * n_bins.bit_length() < value < 4 * n_bins.bit_length()  # noise costs about log2(n_bins)
    assert not all(map(torch.equal, before, state.model.parameters()))
    assert state.progress.skipped == 0
    state.close()


def test_the_numbers_of_the_released_code() -> None:
    """README's commands, and what train.py and optim.py make of them on 8 and on 40 processes."""
    expected = {
        "cifar10": (3, 32, "affine", 8, 512, 256, 977),
        "imagenet32": (3, 48, "affine", 8, 512, 256, 977),
        "imagenet64": (4, 48, "affine", 8, 128, 64, 977),
        "lsun64": (3, 48, "affine", 8, 128, 64, 977),
        "lsun96": (5, 64, "additive", 5, 280, 28, 196),
        "lsun128": (5, 64, "additive", 5, 160, 16, 196),
        "celeba256": (6, 32, "additive", 5, 40, 4, 196),
        "cifar10-classes": (3, 32, "additive", 5, 512, 256, 977),
        "imagenet32-classes": (3, 48, "additive", 5, 512, 256, 977),
    }
    for name, values in expected.items():
        found = config(name)
        model = found.model
        numbers = (found.data.n_bits, found.batch_size, found.init_images, found.warmup_steps)
        assert (model.n_levels, model.n_steps, model.coupling, *numbers) == values, name
        assert (model.hidden, model.permutation, model.net_actnorm, model.border) == (512, "invconv_plain", True, True)
        assert (found.optimizer, found.lr, found.clip_norm) == ("adamax", 1e-3, None)
        assert found.beta2 == found.ema_decay == pytest.approx(1 - 1 / (20 if found.warmup_steps == 196 else 98))
    for name, n_classes in (("cifar10-classes", 10), ("imagenet32-classes", 1000)):
        found = config(name)
        assert (found.class_weight, found.model.n_classes, found.model.classify) == (0.01, n_classes, n_classes)


def test_realnvp_is_realnvp() -> None:
    """Dinh et al. 2017, section 3.6: 3 checkerboards, squeeze, 3 of channels in turn; 4 checkerboards at the end."""
    model = pgf.Glow(pgf.GlowConfig.preset("realnvp", hidden=4))
    for level in model.levels[:2]:
        assert [step.coupling.board.parity for step in level.checkerboard] == [1, 0, 1]
        assert [step.coupling.mask for step in level.steps] == ["channels"] * 3
        assert all(step.permutation.permutation == "reverse" for step in level.steps)
    assert model.levels[2].steps is None
    assert [step.coupling.board.parity for step in model.levels[2].checkerboard] == [1, 0, 1, 0]
    assert [level.checkerboard[0].channels for level in model.levels] == [3, 6, 12]
    specs = {step.coupling.spec[:2] for step in model.modules() if isinstance(step, pgf.FlowStep)}
    assert specs == {("affine", "tanh")}
    assert model.latent_shapes == [(6, 16, 16), (12, 8, 8), (12, 8, 8)]


def test_what_is_given_comes_first() -> None:
    found = TrainConfig.preset("fashion", n_steps=3, batch_size=8, flip=True)
    assert (found.data, found.model.n_steps) == (DataConfig("fashion-mnist", size=32, n_bits=8, flip=True), 3)
    assert (found.batch_size, found.memory, found.max_steps, found.max_minutes) == (8, "store", None, 30.0)
    assert pgf.GlowConfig.preset("nice", image_shape=(1, 8, 8)).image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (1500, None, None, 0)),
        ({"max_steps": 40}, (40, None, None, 0)),
        ({"max_minutes": 2.0}, (None, None, 2.0, 0)),
        ({"max_epochs": 3, "decay_steps": 7}, (None, 3, None, 7)),
    ],
    ids=str,
)
def test_a_limit_takes_the_place_of_all(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = TrainConfig.preset("digits", **given)
    assert (found.max_steps, found.max_epochs, found.max_minutes, found.decay_steps) == expected


def test_labels_can_be_left_out_of_a_preset_that_uses_them() -> None:
    found = config("cifar10-classes", class_weight=0.0)
    assert (found.model.n_classes, found.model.classify) == (10, 0)
    found = config("cifar10-classes", class_conditional=False)
    assert (found.model.n_classes, found.model.classify) == (None, 10)
    assert config("fashion", class_conditional=True, n_classes=10).model.n_classes == 10


@pytest.mark.parametrize("name", presets.CONDITIONAL)
def test_presets_with_a_condition_are_no_models_of_images_alone(name: str) -> None:
    assert pgf.GlowConfig.preset(name).cond_channels == (320,) * pgf.GlowConfig.preset(name).n_levels
    assert name not in presets.table()
    with pytest.raises(ValueError, match=r"model: expected cond_channels=0 \(image sources give no condition\)"):
        TrainConfig.preset(name, "folder:x")


@pytest.mark.parametrize(
    ("side", "minutes", "expected"),
    [
        (32, None, (3, 8, 128, 16)),
        (32, 2.0, (3, 4, 64, 8)),
        (32, 100.0, (3, 12, 128, 32)),
        (128, 20.0, (5, 4, 64, 8)),
        (1024, 20.0, (6, 4, 32, 4)),
        (28, None, (2, 8, 128, 16)),
        (6, None, (1, 12, 128, 32)),
        (2, None, (1, 12, 128, 32)),
    ],
)
def test_a_model_that_a_cpu_can_train(side: int, minutes: float | None, expected: tuple[int, ...]) -> None:
    found = presets.on_cpu(side, minutes)
    assert tuple(found[name] for name in ("n_levels", "n_steps", "hidden", "batch_size")) == expected
    assert (found["max_minutes"], found["max_steps"], found["scale_map"]) == (20.0, None, "tanh")
