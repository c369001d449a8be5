"""A frozen model: the same function from folded buffers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers import FrozenSteps

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


@pytest.mark.parametrize(
    "options",
    [
        {"order": "scale_shift", "scale_map": "exp"},
        {"scale_bias": 0.5, "scale_eps": 0.2},
        {"scale_bias": 0.0, "scale_factor": 2.0},
        {"scale_map": "atan", "scale_clamp": 0.8},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_steps_keep_every_option(options: dict[str, object]) -> None:
    """Also those that a Glow has not."""
    steps, x = pgf.ReversibleSequence([pgf.FlowStep(4, 5, **options) for _ in range(2)]), torch.randn(3, 4, 6, 3)
    steps.initialize(x)
    for step in steps:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
    frozen = FrozenSteps(steps)
    for one, step in zip(frozen.couplings, steps, strict=True):
        assert (one.spec, one.precision) == (step.coupling.spec, step.coupling.precision)
    if "precision" not in options:  # weights that are folded round to other 16 bits
        for found, expected in zip(frozen(x), steps(x), strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


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


def test_leaves_the_model_alone_and_follows_it_not() -> None:
    glow, x = model(), torch.rand(3, 1, 8, 8) - 0.5
    frozen = glow.freeze()
    before = frozen.log_prob(x)
    with torch.no_grad():
        for parameter in glow.levels.parameters():
            parameter.mul_(0.5)
    assert torch.equal(frozen.log_prob(x), before)
    assert all(parameter.requires_grad for parameter in glow.parameters())
    assert glow.memory == "reversible"


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


class _Lent(Tensor):
    """A tensor whose values are those of another one, as a library's own classes have them: no place tells of them."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[_Lent], inner: Tensor) -> _Lent:
        made: _Lent = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*[one.inner if isinstance(one, _Lent) else one for one in args], **(kwargs or {}))


@torch.no_grad()
def test_follows_a_buffer_of_a_class_of_its_own() -> None:
    frozen, x = model(permutation="shuffle").freeze(), torch.rand(3, 1, 8, 8) - 0.5
    steps = frozen.levels[0].steps
    z = steps.inverse(frozen.encode(x)[0].repeat(1, 2, 1, 1))[0]
    steps.offsets = offsets = _Lent(steps.offsets)
    before = steps(z)
    offsets.inner = offsets.inner + 0.5
    found = steps(z)
    steps.offsets = offsets.inner
    assert not torch.equal(found[0], before[0])
    assert torch.equal(found[0], copy.deepcopy(steps)(z)[0])


@torch.no_grad()
def test_calls_that_follow_give_the_same_bits() -> None:
    """In a new copy nothing is there yet that a call could have left."""
    frozen, x = model().freeze(), torch.rand(3, 1, 8, 8) - 0.5
    for _ in range(3):
        assert torch.equal(frozen.log_prob(x), copy.deepcopy(frozen).log_prob(x))
    with torch.inference_mode():
        assert torch.equal(frozen.log_prob(x), copy.deepcopy(frozen).log_prob(x))


def test_gradients_after_calls_without_any() -> None:
    frozen, x = model().freeze(), torch.rand(3, 1, 8, 8) - 0.5
    steps = frozen.levels[0].steps
    steps.matrices.requires_grad_()
    with torch.no_grad():
        steps(torch.randn(3, 4, 4, 4))
    for _ in range(2):
        grad = torch.autograd.grad(frozen.log_prob(x).sum(), steps.matrices)[0]
        assert grad.abs().sum() > 0


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


class LogProb(nn.Module):
    def __init__(self, glow: pgf.Glow) -> None:
        super().__init__()
        self.glow = glow

    def forward(self, x: Tensor) -> Tensor:
        return self.glow.log_prob(x)


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


@pytest.mark.parametrize("frozen", [False, True])
class TestExport:
    def model(self, frozen: bool) -> pgf.Glow:
        return model().freeze() if frozen else model()

    @pytest.mark.full
    def test_log_prob(self, frozen: bool) -> None:
        glow, x = self.model(frozen), torch.rand(3, 1, 8, 8) - 0.5
        with torch.no_grad():
            program = torch.export.export(LogProb(glow), (x,))
            other = torch.rand(3, 1, 8, 8) - 0.5
            assert torch.allclose(program.module()(other), glow.log_prob(other), rtol=1e-5)

    @pytest.mark.full
    def test_decode(self, frozen: bool) -> None:
        glow, x = self.model(frozen), torch.rand(3, 1, 8, 8) - 0.5
        with torch.no_grad():
            latents = tuple(glow.encode(x))
            program = torch.export.export(Decode(glow), latents)
            assert torch.allclose(program.module()(*latents), x, atol=1e-4)

    @pytest.mark.full
    def test_sample(self, frozen: bool) -> None:
        glow, temperature = self.model(frozen), torch.tensor(0.7)
        with torch.no_grad():
            program = torch.export.export(Sample(glow), (temperature,))
            torch.manual_seed(3)
            found = program.module()(temperature)
            torch.manual_seed(3)
            assert torch.allclose(found, glow.sample(4, 0.7), rtol=1e-4, atol=1e-5)
            assert not torch.equal(program.module()(temperature), found), "noise is drawn anew"

    @pytest.mark.full
    def test_saved_and_loaded(self, frozen: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
        path = tmp_path_factory.mktemp("exported") / "glow.pt2"
        glow, x = self.model(frozen), torch.rand(3, 1, 8, 8) - 0.5
        with torch.no_grad():
            torch.export.save(torch.export.export(LogProb(glow), (x,)), path)
            assert torch.allclose(torch.export.load(path).module()(x), glow.log_prob(x), rtol=1e-5)
