"""A model frozen, exported and compiled. That a frozen one is the same function is in the contract."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf


def model(**fields: object) -> pgf.Glow:
    torch.manual_seed(0)
    found = pgf.Glow(**{"image_shape": (1, 8, 8), "n_levels": 2, "n_steps": 2, "hidden": 5, **fields})
    for name, parameter in found.named_parameters():
        if "conv3" in name or "log_gain" in name or "prior" in name or "splits" in name:
            nn.init.normal_(parameter, std=0.1)
    found.initialize(torch.rand(8, *found.config.image_shape) - 0.5)
    return found.eval()


def test_nothing_to_train() -> None:
    frozen = model(learn_prior=False).freeze()
    assert not list(frozen.parameters())
    assert not any(parameter.requires_grad for parameter in model().freeze().parameters())  # those of the priors
    assert not model().freeze().train().training
    assert frozen.memory == "frozen"
    assert frozen.memory_report() == []
    assert frozen.is_initialized
    with pytest.raises(ValueError, match="memory: expected a model that is not frozen"):
        frozen.memory = "store"
    x = (torch.rand(2, 1, 8, 8) - 0.5).requires_grad_()
    frozen.log_prob(x).sum().backward()
    assert x.grad is not None
    frozen.decode([latent.detach().requires_grad_() for latent in frozen.encode(x)]).sum().backward()
    assert [level.steps.inverse_control.report()["passes"] for level in frozen.levels] == [1, 1], "it was recomputed"


def test_state_dict() -> None:
    frozen, other = model().freeze(), model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    target = other.freeze()
    target.load_state_dict(frozen.state_dict())
    x = torch.rand(3, 1, 8, 8) - 0.5
    assert torch.equal(target.log_prob(x), frozen.log_prob(x))
    assert torch.equal(copy.deepcopy(frozen).double().log_prob(x.double()), frozen.double().log_prob(x.double()))


def test_hooks_on_steps_are_refused() -> None:
    glow = model()
    glow.levels[0].steps[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="steps: expected FlowSteps without overridden methods and hooks"):
        glow.freeze()


class Call(nn.Module):
    """What a function makes of a model and of inputs, as a module."""

    def __init__(self, glow: pgf.Glow, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.glow, self.function = glow, function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self.glow, *inputs)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_decoding_and_sampling_are_exported(frozen: bool) -> None:
    glow, x, temperature = model(), torch.rand(3, 1, 8, 8) - 0.5, torch.tensor(0.7)
    glow = glow.freeze() if frozen else glow
    latents = tuple(glow.encode(x))
    decoding = torch.export.export(Call(glow, lambda glow, *latents: glow.decode(list(latents))), latents).module()
    assert torch.allclose(decoding(*latents), x, atol=1e-4)
    sampling = torch.export.export(Call(glow, lambda glow, t: glow.sample(4, t)), (temperature,)).module()
    torch.manual_seed(3)
    found = sampling(temperature)
    torch.manual_seed(3)
    assert torch.allclose(found, glow.sample(4, 0.7), rtol=1e-4, atol=1e-5)
    assert not torch.equal(sampling(temperature), found), "noise is drawn anew"


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
def test_both_directions_and_sampling_are_one_graph(frozen: bool) -> None:
    glow, x = model(memory="store"), torch.rand(3, 1, 8, 8) - 0.5
    glow = glow.freeze() if frozen else glow
    compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        latents = compiled(glow.encode)(x)
        decoded = compiled(glow.decode)(latents)
        torch.testing.assert_close(latents, glow.encode(x), rtol=1e-4, atol=1e-5)
        samples = []
        for sample in (glow.sample, compiled(glow.sample)):
            torch.manual_seed(1)
            samples.append(sample(3, 0.7))
    assert torch.allclose(decoded, x, atol=1e-4)
    assert torch.allclose(*samples, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_inductor_agrees_with_the_fake_kernels() -> None:
    """The code generator relies on the strides that the fake kernels promise."""
    glow, x = model(image_shape=(2, 8, 8), memory="store"), (torch.rand(4, 8, 2, 8) - 0.5).transpose(1, 2)
    compiled = torch.compile(glow.log_prob, fullgraph=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo detected")  # a cache, for one
        assert torch.allclose(compiled(x), glow.log_prob(x), rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("told", ["by its weights", "by a broadcast"])
def test_a_model_that_has_seen_data_is_not_initialised_again(told: str) -> None:
    """Compiled before it has ever run: its actnorms are what they were made."""
    glow = model(memory="store")
    fresh = pgf.Glow(glow.config, memory="store")
    if told == "by its weights":
        fresh.load_state_dict(glow.state_dict())
    else:
        both = ([*each.parameters(), *each.buffers()] for each in (fresh, glow))
        for own, other in zip(*both, strict=True):
            own.data.copy_(other)
    expected = {name: value.clone() for name, value in fresh.named_parameters()}
    x = torch.rand(4, 1, 8, 8) - 0.5
    compiled = torch.compile(fresh.train().log_prob, fullgraph=told == "by its weights", backend="aot_eager")
    assert torch.allclose(compiled(x), glow.log_prob(x), rtol=1e-5)
    assert all(torch.equal(value, expected[name]) for name, value in fresh.named_parameters())
