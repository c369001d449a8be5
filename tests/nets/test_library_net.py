"""A model whose nets are the library's convolutions, as on a GPU: every mode, sampling and a frozen copy."""

from __future__ import annotations

import pytest
import torch
from support.captures import use_library
from support.gradients import perturbed

import pyglow_fast as pgf
from pyglow_fast._core import backend

pytestmark = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(monkeypatch)


@pytest.mark.parametrize("boards", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model(precision: str, boards: int, device: torch.device) -> None:
    """Training steps, sampling and a frozen copy: the gradients of every mode agree."""
    options = {"n_levels": 2, "n_steps": 3, "hidden": 16, "precision": precision, "n_checkerboard": boards}
    model = pgf.Glow(image_shape=(3, 16, 16), **options).to(device)
    x = (torch.rand(4, 3, 16, 16) - 0.5).to(device)
    model.initialize(x)
    perturbed(model, 0.05)
    found = {}
    for memory in ("store", "checkpoint", "reversible"):
        model.memory = memory
        model.zero_grad()
        (-model.log_prob(x)).mean().backward()
        found[memory] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    with torch.no_grad():
        model.eval()
        frozen, own = model.freeze().log_prob(x), model.log_prob(x)
        assert model.sample(2).isfinite().all()
    rounding = 2.0**-8 if precision == "bf16" else 2.0**-13 if device.type == "cuda" else 2.0**-23
    for memory in ("checkpoint", "reversible"):
        error = (found[memory] - found["store"]).norm() / found["store"].norm()
        assert error <= 64 * rounding, memory
    assert ((frozen - own).abs() <= 64 * rounding * own.abs()).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_memory_that_was_full_of_nan(precision: str, device: torch.device) -> None:
    """No op reads unwritten memory: cuDNN, too, whose convolutions with a relu take their output for an addend."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=2, hidden=64, precision=precision).to(device)
    x = (torch.rand(8, 3, 16, 16) - 0.5).to(device)
    model.initialize(x)
    for memory in ("store", "reversible"):
        model.memory = memory
        for _ in range(2):  # what a first call has tried counts in the second
            waiting = [torch.full((2**size,), float("nan"), device=device) for size in range(8, 22) for _ in range(4)]
            del waiting
            model.zero_grad()
            loss = -model.log_prob(x).mean()
            loss.backward()
            assert loss.isfinite()
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters()), memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_algorithms(precision: str, device: torch.device) -> None:
    """No op is refused, and two steps give the same bits."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=3, hidden=16, precision=precision).to(device)
    x = (torch.rand(4, 3, 16, 16) - 0.5).to(device)
    model.initialize(x)
    torch.use_deterministic_algorithms(True)
    try:
        for memory in ("store", "checkpoint", "reversible"):
            model.memory = memory
            first, second = (torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters())) for _ in range(2))
            assert all(map(torch.equal, first, second)), memory
    finally:
        torch.use_deterministic_algorithms(False)
