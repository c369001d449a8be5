"""The model under torch.compile: one graph, the same numbers."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from support.gradients import perturbed

import pyglow_fast as pgf


@pytest.fixture
def model() -> pgf.Glow:
    model = pgf.Glow(image_shape=(2, 8, 8), n_levels=2, n_steps=2, hidden=8, memory="store")
    model.initialize(torch.rand(8, 2, 8, 8) - 0.5)
    perturbed(model, 0.05)
    return model.eval()


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_both_directions_and_sampling_are_one_graph(model: pgf.Glow, frozen: bool) -> None:
    x, model = torch.rand(3, 2, 8, 8) - 0.5, model.freeze() if frozen else model
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        latents = compiled(model.encode)(x)
        decoded = compiled(model.decode)(latents)
        for found, expected in zip(latents, model.encode(x), strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        samples = []
        for sample in (model.sample, compiled(model.sample)):
            torch.manual_seed(1)
            samples.append(sample(3, 0.7))
    assert torch.allclose(decoded, x, atol=1e-4)
    assert torch.allclose(*samples, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_inductor_agrees_with_the_fake_kernels(model: pgf.Glow) -> None:
    """The code generator relies on the strides that the fake kernels promise."""
    x = (torch.rand(4, 8, 2, 8) - 0.5).transpose(1, 2)
    compiled = torch.compile(model.log_prob, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected")  # a cache, for one
        assert torch.allclose(compiled(x), model.log_prob(x), rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("told", ["by its weights", "by a broadcast"])
def test_a_model_that_has_seen_data_is_not_initialised_again(model: pgf.Glow, told: str) -> None:
    """Compiled before it has ever run: its actnorms are what they were made."""
    fresh = pgf.Glow(model.config, memory="store")
    if told == "by its weights":
        fresh.load_state_dict(model.state_dict())
    else:
        for own, other in zip(fresh.parameters(), model.parameters(), strict=True):
            own.data.copy_(other.data)
        for own, other in zip(fresh.buffers(), model.buffers(), strict=True):
            own.copy_(other)
    expected = {name: value.clone() for name, value in fresh.named_parameters()}
    x = torch.rand(4, 2, 8, 8) - 0.5
    compiled = torch.compile(fresh.train().log_prob, fullgraph=told == "by its weights", backend="aot_eager")
    assert torch.allclose(compiled(x), model.log_prob(x), rtol=1e-5)
    assert all(torch.equal(value, expected[name]) for name, value in fresh.named_parameters())
