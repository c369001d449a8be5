"""Training steps of other libraries' models, accelerated, captured as a CUDA graph would be and replayed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from support.accelerate_cases import MEMORIES
from support.captures import Recording, capture_guard, like_a_gpu
from support.helpers import tensors
from support.structures import BY_NAME, STRUCTURES, Structure
from torch import Tensor, nn

from pyglow_fast.interop import table
from pyglow_fast.interop.accelerate import accelerate
from pyglow_fast.runs import drift

pytestmark = pytest.mark.full

KINDS = ("normflows", "nflows-halves", "nflows-alternating", "freia", "glow-tts", "chaiyujin")
# Whose layers are those of other cases.
OTHERS = ("chaiyujin-y0ast", "freia-few", "freia-git", "freia-glow", "freia-graph", "freia-two", "freia-volumes")


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    value, named = loss(), {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}
    return {"loss": value.detach(), **grads}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few positions one is soon beyond the default tolerance."""
    monkeypatch.setattr(drift, "default_tolerance", lambda *_: 1e-9)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    "case",
    [case for case in STRUCTURES if case.name.startswith(KINDS) and not case.name.startswith(OTHERS)],
    ids=lambda case: case.name,
)
def test_replays(case: Structure, memory: str | None) -> None:
    """Of other inputs and parameters: what the model itself gives, but for rounding."""
    model, (data, conditions) = case.model(), case.batch()
    accelerate(model, memory=memory)

    def loss() -> Tensor:
        values = tensors(case.forward(model, data, conditions))
        return torch.stack([value.square().mean() for value in values]).sum()

    with like_a_gpu():
        for _ in range(2):
            gradients(model, loss)
        with Recording() as graph, capture_guard():
            found = gradients(model, loss)
        for _ in range(2):
            data[0].add_(0.01 * torch.randn_like(data[0]))
            graph.replay()
            expected = gradients(model, loss)
            # Anchors that have moved on round otherwise.
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.001 if parameter.requires_grad else 1.0)


def test_indices_that_a_graph_reads_outlive_a_load() -> None:
    """FrEIA's of a hard permutation: loading reads them anew."""
    case = BY_NAME["freia"]
    model, (data, conditions) = case.model(), case.batch()
    accelerate(model)
    block = next(module for module in model.modules() if hasattr(module, "w_perm"))

    def step() -> None:
        gradients(model, lambda: case.forward(model, data, conditions)[0].sum())

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
