"""Makes one layer by normflows and by its adapter, with random weights, and what both make of an input."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import normflows as nf
import torch
from torch import Tensor, nn

import pyglow_fast.interop.normflows as fast
from support.helpers import tensors

DIRECTIONS = ("forward", "inverse")
Build = Callable[[Any], nn.Module]  # from a library: normflows or the adapter


def built(build: Build, library: Any, seed: int = 7) -> nn.Module:
    """A layer or model as it starts from a seed."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # normflows starts from torch.lu, which is deprecated
        return build(library)


def randomise(model: nn.Module, size: float = 0.15) -> nn.Module:
    """Move every parameter off its start: the same way for models of the same parameters."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(size * noise.to(parameter.dtype))
    return model


def mark_initialized(model: nn.Module) -> nn.Module:
    """Let no actnorm of a model wait for data."""
    for module in model.modules():
        if isinstance(module, nf.flows.ActNorm):
            module.data_dep_init_done.fill_(1.0)
    return model


def pair(build: Build, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Make normflows' layer and ours, with the same random weights, initialised."""
    theirs, ours = (randomise(mark_initialized(built(build, library).to(dtype))) for library in (nf, fast))
    return theirs, ours


def outcome(layer: nn.Module, direction: str, z: Any) -> tuple[Any, list[Tensor | None]]:
    """(z', log_det), and the gradients of all inputs and parameters for random weights on every output."""
    leaves = [value.detach().clone().requires_grad_() for value in tensors(z)]
    out = getattr(layer, direction)(leaves[0] if isinstance(z, Tensor) else leaves)
    generator = torch.Generator().manual_seed(13)
    objective = leaves[0].new_zeros(())
    for value in tensors(out):
        weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        objective = objective + (value * weight.to(value.dtype)).sum()
    wanted = [*leaves, *layer.parameters()]
    return out, list(torch.autograd.grad(objective, wanted, allow_unused=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Compute the error relative to the largest expected value, or to 1."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def assert_equal_outcomes(actual: tuple[Any, list[Tensor | None]], expected: tuple[Any, list[Tensor | None]]) -> None:
    """Outputs of the same type, shape and dtype, and gradients, equal to 1e-10 in float64."""
    (out, grads), (expected_out, expected_grads) = actual, expected
    assert type(out[0]) is type(expected_out[0])
    pairs = [*zip(tensors(out), tensors(expected_out), strict=True)]
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            pairs.append((got, wanted))
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert relative_error(got, wanted) < 1e-10


def assert_equal_states(actual: nn.Module, expected: nn.Module) -> None:
    """state_dicts with the same keys, shapes and dtypes, and values equal to 1e-12 in float64, 1e-5 in float32."""
    found, wanted = actual.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        bound = 1e-12 if value.dtype == torch.float64 else 1e-5
        assert relative_error(found[name].double(), value.double()) < bound, name
