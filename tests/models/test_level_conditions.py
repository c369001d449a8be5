"""Glows with a condition of each level, injectors, transitions, other splits and states between the steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gradients import perturbed
from support.helpers import assert_close
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import latents as tools
from pyglow_fast.reference import gaussian_log_prob

CHANNELS = (2, 3, 1)
FIELDS: dict[str, Any] = {
    "image_shape": (3, 16, 8),
    "n_levels": 3,
    "n_steps": 2,
    "hidden": 5,
    "cond_channels": CHANNELS,
    "net_actnorm": True,
    "injector": True,
    "n_transitions": 1,
    "n_splits": 1,
    "split_ratio": 1 / 3,
    "cond_splits": True,
    "learn_top": False,
}


def batch(n: int, channels: tuple[int, ...] = CHANNELS) -> tuple[Tensor, list[Tensor]]:
    x = torch.rand(n, 3, 16, 8, dtype=torch.float64) - 0.5
    conds = [torch.randn(n, c, 8 >> i, 4 >> i, dtype=torch.float64) for i, c in enumerate(channels)]
    return x, conds


def model_of(memory: str = "reversible", **fields: Any) -> pgf.Glow:
    torch.manual_seed(1)
    model = pgf.Glow(pgf.GlowConfig(**{**FIELDS, **fields}), memory=memory).double()
    model.initialize(*batch(32, tuple(model.config.cond_channels_of(level) for level in range(3))))
    perturbed(model, 0.05)
    return model


def test_shapes() -> None:
    model = model_of()
    x, conds = batch(2)
    latents, log_det = model(x, conds)
    # 12 channels, of which a third is factored out; 8 are 32 after the squeeze, and 128 after the next one.
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_shapes == [(4, 8, 4), (128, 2, 1)]
    assert [shape[0] for shape in model.state_shapes] == [12, 32, 128]
    assert log_det.shape == (2,)
    assert [len(level.steps) for level in model.levels] == [3, 3, 3]
    assert model.prior.mean_log_sd is None


def test_encode_decode_noise_and_density_agree() -> None:
    model = model_of()
    x, conds = batch(2)
    as_dict, frozen = dict(enumerate(conds)), model.freeze()
    noise, log_det = model.to_noise(x, cond=as_dict)
    again, inverse_log_det = model.from_noise(noise, cond=conds)
    assert_close(again, x, 100.0)
    assert_close(inverse_log_det, -log_det, 100.0)
    zero = torch.zeros((), dtype=torch.float64)
    density = sum(gaussian_log_prob(eps, zero.expand_as(eps), zero.expand_as(eps)) for eps in noise)
    for own in (model, frozen):
        assert_close(own.decode(own.encode(x, conds), as_dict), x, 100.0)
        assert_close(own.log_prob(x, cond=conds), density + log_det, 100.0)
    assert model.sample(3, 0.5, cond=[cond[:1].expand(3, -1, -1, -1) for cond in conds]).shape == (3, 3, 16, 8)
    with pytest.raises(ValueError, match="model: expected one that is not frozen"):
        frozen.intermediates(x, conds)


def test_the_condition_of_each_level_matters_from_its_level_on() -> None:
    model = model_of()
    x, conds = batch(2)
    _, states, _ = model.intermediates(x, conds)
    for level in range(3):
        changed = [cond + (i == level) for i, cond in enumerate(conds)]
        _, found, _ = model.intermediates(x, changed)
        same = [torch.equal(a[-1], b[-1]) for a, b in zip(found, states, strict=True)]
        assert same == [i < level for i in range(3)]


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_intermediates_and_their_gradients(memory: str) -> None:
    """By hand: squeeze, then the steps one after another."""
    model, x, conds = model_of(memory), *batch(2)
    latents, states, log_det = model.intermediates(x, conds, at=(0, 1))
    expected, expected_log_det = model(x, conds)
    assert_close((*latents, log_det), (*expected, expected_log_det), 10.0)
    state, by_hand = x, []
    for level, cond, split in zip(model.levels[:2], conds[:2], (model.splits[0], None), strict=True):
        state = torch.nn.functional.pixel_unshuffle(state, 2)
        for step in level.steps:
            state, _ = step(state, cond)
            by_hand.append(state)
        state = state if split is None else split.parts(state)[0]
    assert_close(states[0] + states[1], by_hand, 10.0)
    losses = [run[0].square().sum() + run[4].square().sum() for run in (states[0] + states[1], by_hand)]
    parameters = [parameter for level in model.levels[:2] for parameter in level.parameters()]
    gradients = [torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in losses]
    assert_close(*gradients, condition=100.0)


def test_one_condition_for_all_levels_may_still_be_given_by_level() -> None:
    model = model_of(cond_channels=2)
    x, _ = batch(2)
    whole = torch.randn(2, 2, 16, 8, dtype=torch.float64)
    sizes = [shape[1:] for shape in model.state_shapes]
    by_level = [torch.nn.functional.interpolate(whole, size, mode="area") for size in sizes]
    assert_close(model.log_prob(x, cond=by_level), model.log_prob(x, cond=whole), 10.0)
    vector = torch.randn(2, 2, dtype=torch.float64)
    assert_close(model.log_prob(x, cond=[vector] * 3), model.log_prob(x, cond=vector), 10.0)


def test_kept_levels_of_fewer_latents() -> None:
    model = model_of()
    x, conds = batch(2)
    latents = model.encode(x, conds)
    assert_close(tools.edited(model, latents, keep=[1, 1], space="latent", cond=conds), x, 100.0)
    found = model.encode(tools.edited(model, latents, keep=[0, 1], space="latent", cond=conds), conds)
    assert_close(found[1], latents[1], 100.0)
    _, states, _ = model.intermediates(x, conds)
    mean, _ = model.splits[0].prior(model.splits[0].parts(states[0][-1])[0], conds[0])
    assert_close(found[0], mean, 100.0)


def test_the_precision_is_that_of_injectors_too() -> None:
    model = model_of()
    model.precision = "bf16"
    steps = list(model.levels[0].steps)
    assert [step.injector.precision for step in steps if step.injector is not None] == ["bf16", "bf16"]
