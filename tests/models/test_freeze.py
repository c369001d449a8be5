"""A frozen model: the same function from folded buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf

CONFIGS = [
    {},
    {"net_actnorm": True, "permutation": "invconv_plain", "n_classes": 3},
    {"coupling": "additive", "permutation": "shuffle", "learn_prior": False},
    {"cond_channels": 2, "scale_map": "tanh"},
    {"cond_channels": 2, "n_checkerboard": 1, "n_last_checkerboard": 2, "net_actnorm": True},
]


def model(**fields: object) -> pgf.Glow:
    torch.manual_seed(0)
    found = pgf.Glow(**{"image_shape": (1, 8, 8), "n_levels": 2, "n_steps": 2, "hidden": 5, **fields})
    for name, parameter in found.named_parameters():
        if "conv3" in name or "log_gain" in name or "prior" in name or "splits" in name:
            nn.init.normal_(parameter, std=0.1)
    found.initialize(torch.rand(8, 1, 8, 8) - 0.5, torch.randn(8, 2) if found.config.cond_channels else None)
    return found.eval()


def inputs(glow: pgf.Glow, n: int = 3) -> dict[str, Tensor]:
    extra = {}
    if glow.config.n_classes is not None:
        extra["y"] = torch.arange(n) % glow.config.n_classes
    if glow.config.cond_channels:
        extra["cond"] = torch.randn(n, glow.config.cond_channels, 8, 8)
    return extra


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_is_the_same_function(fields: dict[str, object]) -> None:
    glow, x = model(**fields), torch.rand(3, 1, 8, 8) - 0.5
    frozen, extra = glow.freeze(), inputs(glow)
    cond = {name: value for name, value in extra.items() if name == "cond"}
    for record in (False, True):
        with torch.set_grad_enabled(record):
            assert torch.allclose(frozen.log_prob(x, **extra), glow.log_prob(x, **extra), rtol=1e-5)
            latents = frozen.encode(x, **cond)
            for one, other in zip(latents, glow.encode(x, **cond), strict=True):
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
            assert torch.allclose(frozen.decode(latents, **cond), x, atol=1e-4)
    samples = [which.sample(3, 0.7, generator=torch.Generator().manual_seed(1), **extra) for which in (frozen, glow)]
    assert torch.allclose(*samples, rtol=1e-4, atol=1e-5)


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


@torch.no_grad()
def test_hooks_on_frozen_nets_are_called() -> None:
    frozen, x, calls = model().freeze(), torch.rand(3, 1, 8, 8) - 0.5, []
    before = frozen.log_prob(x)
    net = frozen.levels[0].steps.couplings[1].net
    handle = net.register_forward_hook(lambda module, inputs, out: calls.append(len(inputs)) or 0.5 * out)
    assert not torch.equal(frozen.log_prob(x), before)
    frozen.sample(2)
    assert calls == [1, 1]
    handle.remove()
    assert torch.equal(frozen.log_prob(x), before)


@torch.no_grad()
@pytest.mark.parametrize("permutation", ["invconv", "shuffle"])
@pytest.mark.parametrize("replace", [False, True])
def test_follows_its_buffers(permutation: str, replace: bool) -> None:
    """Written to, or others in their place, as by loading: the next call is by what they hold then."""
    frozen, x = model(permutation=permutation).freeze(), torch.rand(3, 1, 8, 8) - 0.5
    latents = frozen.encode(x)
    for name in ("offsets", "matrices", "inverses", "couplings.0.net.w3"):
        steps = copy.deepcopy(frozen).levels[0].steps
        z = steps.inverse(latents[0].repeat(1, 2, 1, 1))[0]
        before = (*steps(z), *steps.inverse(z))
        owner, _, last = name.rpartition(".")
        module = steps.get_submodule(owner)
        if replace:
            setattr(module, last, 1.5 * getattr(module, last) + 0.1)
        else:
            getattr(module, last).data.mul_(1.5).add_(0.1)
        found = (*steps(z), *steps.inverse(z))
        assert not all(map(torch.equal, found, before))
        assert all(map(torch.equal, copy.deepcopy(steps)(z), found))


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


def test_refusals() -> None:
    fresh = pgf.Glow(image_shape=(1, 8, 8), n_levels=2, n_steps=2, hidden=5)
    with pytest.raises(ValueError, match=r"steps: expected initialised actnorms .*, found fresh ones"):
        fresh.freeze()
    glow = model()
    glow.levels[0].steps[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="steps: expected FlowSteps without overridden methods and hooks"):
        glow.freeze()


class Decode(nn.Module):
    def __init__(self, glow: pgf.Glow) -> None:
        super().__init__()
        self.glow = glow

    def forward(self, *latents: Tensor) -> Tensor:
        return self.glow.decode(list(latents))


class Sample(nn.Module):
    def __init__(self, glow: pgf.Glow) -> None:
        super().__init__()
        self.glow = glow

    def forward(self, temperature: Tensor) -> Tensor:
        return self.glow.sample(4, temperature)


@pytest.mark.full
@pytest.mark.parametrize("frozen", [False, True])
@torch.no_grad()
def test_decoding_and_sampling_are_exported(frozen: bool) -> None:
    glow, x, temperature = model(), torch.rand(3, 1, 8, 8) - 0.5, torch.tensor(0.7)
    glow = glow.freeze() if frozen else glow
    latents = tuple(glow.encode(x))
    decoding = torch.export.export(Decode(glow), latents).module()
    assert torch.allclose(decoding(*latents), x, atol=1e-4)
    sampling = torch.export.export(Sample(glow), (temperature,)).module()
    torch.manual_seed(3)
    found = sampling(temperature)
    torch.manual_seed(3)
    assert torch.allclose(found, glow.sample(4, 0.7), rtol=1e-4, atol=1e-5)
    assert not torch.equal(sampling(temperature), found), "noise is drawn anew"
