"""Training steps of other libraries' models, accelerated, captured as a CUDA graph would be and replayed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accelerate_cases import CASES, MEMORIES, images, prepared
from support.captures import Recording, capture_guard, like_a_gpu
from support.covering import pairs
from support.glow_tts_cases import NORMS, TextDecoder, mask_of_lengths, moved
from support.srflow import FlowStep, randomised
from torch import Tensor, nn

from pyglow_fast.interop import chaiyujin as adapter
from pyglow_fast.interop import glow_tts, table
from pyglow_fast.interop.accelerate import accelerate
from pyglow_fast.reversible import drift

pytestmark = pytest.mark.full

CHAIYUJIN: dict[str, dict[str, Any]] = {
    "affine": {},
    "lu": {"LU_decomposed": True},
    "shuffle": {"flow_permutation": "shuffle"},
    "reverse": {"flow_permutation": "reverse"},
    "no coupling": {"flow_coupling": "noCoupling", "flow_permutation": "shuffle"},
}


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    value, named = loss(), {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
    return {"loss": value.detach(), **grads}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few positions one is soon beyond the default tolerance."""
    monkeypatch.setattr(drift, "default_tolerance", lambda *_: 1e-9)


def assert_replays(model: nn.Module, loss: Callable[[], Tensor], x: Tensor) -> None:
    """Of other inputs and parameters: what the model itself gives, but for rounding."""
    with like_a_gpu():
        for _ in range(2):
            gradients(model, loss)
        with Recording() as graph, capture_guard():
            found = gradients(model, loss)
        for _ in range(2):
            x.add_(0.01 * torch.randn_like(x))
            graph.replay()
            expected = gradients(model, loss)
            assert found.keys() == expected.keys()
            for name, value in found.items():  # anchors that have moved on round otherwise
                torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.001 if parameter.requires_grad else 1.0)


@pairs(pytest.mark.parametrize("name", CASES), pytest.mark.parametrize("memory", MEMORIES))
def test_models(name: str, memory: str | None) -> None:
    model, loss, _ = prepared(name)
    x = images(4)
    accelerate(model, memory=memory)
    assert_replays(model, lambda: loss(model, x), x)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", CHAIYUJIN)
def test_steps_of_chaiyujin(name: str, memory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "LEAST_POSITIONS", 0)
    monkeypatch.setattr(adapter, "LEAST_WITHOUT_NET", 0)
    step = randomised(FlowStep(4, 40, **CHAIYUJIN[name]).double())
    accelerate(step, memory=memory)
    assert type(step) is not FlowStep
    x, log_det = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def loss() -> Tensor:
        z, gained = step(x, log_det)
        return z.square().sum() - gained.sum()

    assert_replays(step, loss, x)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("norm", NORMS)
def test_glow_tts(norm: str, memory: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glow_tts, "LEAST_POSITIONS", 0)
    model = moved(TextDecoder(4, 6, 3, kernel=3, rate=2, layers=2, norm=norm)).double()
    accelerate(model, memory=memory)
    x, mask = torch.randn(3, 4, 16, dtype=torch.float64), mask_of_lengths((16, 9, 4), 16)

    def loss() -> Tensor:
        z, log_det = model(x, mask)
        return z.square().sum() - log_det.sum()

    assert_replays(model, loss, x)


def test_indices_that_a_graph_reads_outlive_a_load() -> None:
    """FrEIA's of a hard permutation: loading reads them anew."""
    model, loss, _ = prepared("FrEIA")
    accelerate(model)
    x = images(4)
    block = next(module for module in model.modules() if hasattr(module, "w_perm"))

    def step() -> None:
        gradients(model, lambda: loss(model, x))

    with like_a_gpu():
        step()
        with capture_guard():
            step()
        alive = [weakref.ref(order) for _, order in table._read[block].values()]
        model.load_state_dict(model.state_dict())
        step()
        gc.collect()
    assert all(value() is not None for value in alive)
    assert alive
    assert all(order is not alive[0]() for _, order in table._read[block].values())
