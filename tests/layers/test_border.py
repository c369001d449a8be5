"""The border term: a ring of ones around the image that the 3x3 convolutions see, in every way that a net runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.covering import pairs
from support.helpers import assert_close
from support.library_ops import use_library
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers.border import border_map
from pyglow_fast.models.prior import TopPrior

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def randomised(module: nn.Module, spread: float = 0.3) -> Any:
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(0.0, spread)
    return module.eval()  # no actnorm takes its values from the first batch


def with_ring(x: Tensor, weight: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """The convention written out: x padded with zeros, and a channel that is 1 where x was padded."""
    pads = [1, 1] * (x.dim() - 2)
    marked = torch.cat([F.pad(x, pads), F.pad(torch.zeros_like(x[:, :1]), pads, value=1.0)], dim=1)
    return CONVOLUTIONS[x.dim() - 2](marked, torch.cat([weight, kernel], dim=1), bias)


def written_out(net: pgf.CouplingNet, x: Tensor) -> Tensor:
    hidden = with_ring(x, net.conv1.weight, net.border1, net.conv1.bias)
    if isinstance(net.norm1, pgf.ActNorm):
        hidden = net.norm1(hidden)[0]
    hidden = net.conv2(hidden.relu())
    if isinstance(net.norm2, pgf.ActNorm):
        hidden = net.norm2(hidden)[0]
    out = with_ring(hidden.relu(), net.conv3.weight, net.border3, net.conv3.bias)
    return out * (3.0 * net.log_gain).exp()


@pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 1, 3), (1, 1)], ids=str)
def test_map_is_what_the_ring_contributes(spatial: tuple[int, ...]) -> None:
    kernel = torch.randn(5, 1, *[3] * len(spatial), dtype=torch.float64)
    zeros = torch.zeros(1, 2, *spatial, dtype=torch.float64)
    found = border_map(kernel, spatial)
    assert_close(found, with_ring(zeros, torch.zeros_like(kernel).expand(-1, 2, *kernel.shape[2:]), kernel, None))
    inner = tuple(slice(1, -1) for _ in spatial)
    assert not found[(..., *inner)].any()


@pairs(
    pytest.mark.parametrize("actnorm", [False, True]),
    pytest.mark.parametrize("cond_channels", [0, 2]),
    pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 1, 3), (1, 1)], ids=str),
)
def test_formula(actnorm: bool, cond_channels: int, spatial: tuple[int, ...]) -> None:
    net = randomised(pgf.CouplingNet(2, 5, 4, actnorm, cond_channels, border=True, dims=len(spatial)))
    x = torch.randn(3, 2, *spatial, dtype=torch.float64)
    cond = torch.randn(3, cond_channels, *spatial, dtype=torch.float64) if cond_channels else None
    expected = written_out(net, x if cond is None else torch.cat([x, cond], dim=1))
    assert_close(net(x, cond), expected, condition=10.0)
    hook = net.conv2.register_forward_hook(lambda *_: None)
    assert_close(net(x, cond), expected, condition=10.0)
    hook.remove()


@pytest.mark.parametrize("backend", ["own", "library"])
@pytest.mark.parametrize("actnorm", [False, True])
def test_gradients(actnorm: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "library":
        use_library(monkeypatch)
    net = randomised(pgf.CouplingNet(2, 3, 4, actnorm, border=True))
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, *net.parameters()], torch.randn(2, 3, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad((net(x) * weights).sum(), inputs)
    expected = torch.autograd.grad((written_out(net, x) * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, condition=100.0)


def test_starts_without_one() -> None:
    net, plain = pgf.CouplingNet(2, 4, 6, border=True), pgf.CouplingNet(2, 4, 6)
    assert not net.border1.any()
    assert not net.border3.any()
    missing, extra = net.load_state_dict(plain.state_dict(), strict=False)
    assert (set(missing), extra) == ({"border1", "border3"}, [])
    randomised(plain)
    net.double().load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    assert_close(net(x), plain(x), condition=10.0)


def test_hidden_actnorms_initialise_behind_it() -> None:
    net = randomised(pgf.CouplingNet(2, 4, 6, actnorm=True, border=True))
    x = torch.randn(8, 2, 4, 5, dtype=torch.float64)
    for norm in (net.norm1, net.norm2):
        norm.initialized.fill_(False)
        norm._known_initialized = False
    net.initialize(x)
    hidden = net.norm1(with_ring(x, net.conv1.weight, net.border1, None))[0]
    assert_close(hidden.mean((0, 2, 3)), torch.zeros(6).double(), condition=10.0)


MODELS: dict[str, dict[str, Any]] = {
    "affine": {"image_shape": (1, 8, 8), "net_actnorm": True},
    "additive": {"image_shape": (1, 8, 8), "coupling": "additive", "n_classes": 3},
    "condition": {"image_shape": (1, 8, 4), "cond_channels": 2},
    "one dimension": {"image_shape": (2, 16)},
    "three dimensions": {"image_shape": (1, 4, 4, 8), "n_levels": 1},
}


def model_and_batch(name: str) -> tuple[pgf.Glow, tuple[Tensor | None, ...]]:
    config = pgf.GlowConfig(**{"n_levels": 2, "n_steps": 3, "hidden": 5, "border": True, **MODELS[name]})
    model = pgf.Glow(config).double()
    x = torch.rand(4, *config.image_shape, dtype=torch.float64) - 0.5
    cond = torch.randn(4, config.cond_channels, dtype=torch.float64) if config.cond_channels else None
    y = None if config.n_classes is None else torch.arange(4) % config.n_classes
    model.initialize(x, cond)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, (x, y, cond)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_memory_modes_agree_in_strips(name: str, memory: str) -> None:
    """A budget of one byte cuts every sample into strips of a row or so: the border stays that of the image."""
    model, batch = model_and_batch(name)
    model.memory = "store"
    model.log_prob(*batch).sum().backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    assert any("border1" in key and bool(grad.any()) for key, grad in expected.items())
    assert expected["prior.border"].any()
    model.zero_grad()
    model.memory = memory
    for level in model.levels:
        level.steps.memory_budget = 1
    model.log_prob(*batch).sum().backward()
    for key, value in model.named_parameters():
        if key in expected:
            assert_close(value.grad, expected[key], condition=1000.0)


@pytest.mark.parametrize("name", MODELS)
def test_bijection_frozen_and_cached(name: str) -> None:
    model, (x, y, cond) = model_and_batch(name)
    model.eval()
    recorded = model.log_prob(x, y, cond)
    frozen = model.freeze()
    for level in model.levels:
        level.steps.memory_budget = 1
    with torch.no_grad():
        assert_close(model.log_prob(x, y, cond), recorded, condition=1000.0)
        assert_close(frozen.log_prob(x, y, cond), recorded, condition=1000.0)
        latents = model.encode(x, cond)
        assert_close(model.decode(latents, cond), x, condition=1000.0)
        assert_close(frozen.decode(latents, cond), x, condition=1000.0)
        draws = [one.sample(4, 0.1, y, cond, torch.Generator().manual_seed(1)) for one in (model, frozen)]
        assert_close(draws[0], draws[1], condition=1000.0)


@pytest.mark.full
def test_compiles_as_one_graph() -> None:
    model, (x, _, _) = model_and_batch("affine")
    model.eval()
    model.memory = "store"
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model.log_prob(x), condition=1000.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near(precision: str) -> None:
    model, (x, _, _) = model_and_batch("affine")
    model, x = model.float(), x.float()
    with torch.no_grad():
        exact = model.log_prob(x)
        model.precision = precision
        assert float(((model.log_prob(x) - exact) / exact).abs().max()) < 0.05


@pytest.mark.full
def test_frozen_is_exported() -> None:
    model, (x, _, _) = model_and_batch("affine")
    frozen = model.freeze()

    class LogProb(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = frozen

        def forward(self, x: Tensor) -> Tensor:
            return self.model.log_prob(x)

    with torch.no_grad():
        exported = torch.export.export(LogProb(), (x,)).module()
        assert_close(exported(x), frozen.log_prob(x), condition=1000.0)


def test_the_term_changes_the_rim_alone() -> None:
    prior = randomised(TopPrior(3, border=True))
    mean, log_sd = prior(torch.zeros(2, 3, 4, 5).double(), None)
    assert mean.shape == log_sd.shape == (1, 3, 4, 5)
    assert_close(mean[0, :, 1:-1, 1:-1], prior.mean_log_sd[:3].reshape(3, 1, 1).expand(3, 2, 3))
    split = randomised(pgf.Split(4, border=True))
    kept = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    expected = with_ring(kept, split.conv.weight, split.border, split.conv.bias) * (3.0 * split.log_gain).exp()
    assert_close(torch.cat(split.prior(kept), dim=1), expected, condition=10.0)


def test_none_where_no_prior_is_learned() -> None:
    model = pgf.Glow(image_shape=(1, 4, 4), n_levels=2, n_steps=1, hidden=2, learn_prior=False, border=True)
    names = {name for name, _ in model.named_parameters() if "border" in name}
    assert names == {f"levels.{i}.steps.0.coupling.net.border{k}" for i in (0, 1) for k in (1, 3)}
