"""Glow.make_graphed: on a GPU the graphs themselves, elsewhere all that is around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.models import graphed

N, SHAPE = 4, (3, 8, 8)


def make(device: str = "cpu", **options: object) -> tuple[pgf.Glow, Tensor]:
    torch.manual_seed(0)
    model = pgf.Glow(image_shape=SHAPE, n_levels=2, n_steps=2, hidden=16, **options)
    x = torch.rand(N, *SHAPE) - 0.5
    channels = model.config.cond_channels
    model.initialize(x, torch.randn(N, channels) if channels else None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model.to(device), x.to(device)


def expected(model: pgf.Glow, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    loss = -model.log_prob(x, y).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def check_step(model: pgf.Glow, graphs: graphed.GraphedGlow, x: Tensor, y: Tensor | None = None) -> None:
    loss, gradients = expected(model, x, y)
    torch.testing.assert_close(graphs.train_step(x, y), loss, rtol=1e-5, atol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a CUDA graph: a replay runs the function again, and writes where the first run has written."""

    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        parameters = function.__self__._parameters  # type: ignore[attr-defined]
        result = function().clone()
        places = [parameter.grad for parameter in parameters]

        def replay() -> None:
            kept = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None
            result.copy_(function())
            for place, old, parameter in zip(places, kept, parameters, strict=True):
                if place is not None and parameter.grad is not None:
                    place.copy_(parameter.grad)
                parameter.grad = old

        return replay, result

    monkeypatch.setattr(graphed, "_require_gpu", lambda device: None)
    monkeypatch.setattr(graphed, "_warm_up", lambda functions, device: [function() for function in functions])
    monkeypatch.setattr(graphed, "_capture", capture)


def test_the_step_is_the_models_after_an_update_too(recorded: None) -> None:
    model, x = make()
    graphs = model.make_graphed(x)
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(2):
        x = x.roll(1, dims=-1)
        check_step(model, graphs, x)
        optimizer.step()
        optimizer.zero_grad()  # sets them to None: the next step puts them back


def test_gradients_that_were_there_are_left_alone(recorded: None) -> None:
    model, x = make()
    kept = [torch.ones_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), kept, strict=True):
        parameter.grad = gradient
    graphs = model.make_graphed(x)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), kept, strict=True))
    check_step(model, graphs, x)


def test_sampling_is_the_models(recorded: None) -> None:
    model, x = make()
    graphs = model.make_graphed(x, n_samples=3)
    temperature = torch.tensor([0.0, 0.5, 1.0])
    torch.manual_seed(1)
    found = graphs.sample(temperature)
    torch.manual_seed(1)
    torch.testing.assert_close(found, model.sample(3, temperature))
    assert graphs.sample(0.7).data_ptr() != graphs.sample(0.7).data_ptr()  # the caller's own


def test_classes(recorded: None) -> None:
    model, x = make(n_classes=5)
    y = torch.arange(N)
    graphs = model.make_graphed(x, y)
    check_step(model, graphs, x, y.flip(0))
    assert graphs.sample().shape == (N, *SHAPE)
    torch.manual_seed(2)
    found = graphs.sample(0.5, y)
    torch.manual_seed(2)
    torch.testing.assert_close(found, model.sample(N, 0.5, y))


def test_conditions(recorded: None) -> None:
    model, x = make(cond_channels=2)
    cond = torch.randn(N, 2)
    graphs = model.make_graphed(x, cond=cond, n_samples=2)
    graphs.train_step(x, cond=-cond)
    torch.manual_seed(3)
    found = graphs.sample(0.5, cond=cond[:2])
    torch.manual_seed(3)
    torch.testing.assert_close(found, model.sample(2, 0.5, cond=cond[:2]))


def test_what_does_not_fit_the_capture_is_refused_before_anything_is_copied(recorded: None) -> None:
    model, x = make()
    graphs = model.make_graphed(x)
    before = graphs._inputs["x"].clone()
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 of shape \(4, 3, 8, 8\), as captured, found"):
        graphs.train_step(x[:2])
    with pytest.raises(ValueError, match=r"y: expected None, found torch\.int64 of shape"):
        graphs.train_step(x + 1, torch.zeros(N, dtype=torch.int64))
    assert torch.equal(graphs._inputs["x"], before)
    with pytest.raises(ValueError, match="temperature: expected finite values, 0 or more"):
        graphs.sample(-1.0)


def test_refusals() -> None:
    model, x = make()
    with pytest.raises(ValueError, match="model: expected one on a CUDA device: CUDA graphs are captured there"):
        model.make_graphed(x)
    with pytest.raises(ValueError, match="model: expected one that is not frozen"):
        model.freeze().make_graphed(x)
    model, x = make(cond_channels=2)
    for conditions in ([torch.randn(N, 2)] * 2, {0: torch.randn(N, 2), 1: torch.randn(N, 2)}):
        with pytest.raises(ValueError, match="cond: expected None or one tensor for all levels"):
            model.make_graphed(x, cond=conditions)  # type: ignore[arg-type]


def test_more_refusals(recorded: None) -> None:
    model, x = make()
    with pytest.raises(ValueError, match="n_samples: expected a whole number, 1 or more, found 0"):
        model.make_graphed(x, n_samples=0)
    with pytest.raises(ValueError, match="actnorms that have seen data"):
        pgf.Glow(image_shape=SHAPE, n_levels=1, n_steps=1, hidden=8).make_graphed(x)
    with pytest.raises(ValueError, match="x: expected"):
        model.make_graphed(x[:, :2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_on_a_gpu(memory: str) -> None:
    model, x = make("cuda", memory=memory)
    graphs = model.make_graphed(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(3):
        x = x.roll(1, dims=-1)
        check_step(model, graphs, x)
        optimizer.step()
    torch.testing.assert_close(graphs.sample(0.0), model.sample(N, 0.0), rtol=1e-4, atol=1e-4)
    assert not torch.equal(graphs.sample(), graphs.sample())
