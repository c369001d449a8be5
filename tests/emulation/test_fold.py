"""The channel maps of convolutions in LU factors, folded on a GPU, against torch's ops in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.emulator import EmulatedOps
from torch import Tensor


@pytest.fixture
def emulator(_library: Path) -> EmulatedOps:
    return EmulatedOps(_library)


def folded(factors: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """As csrc/core.h describes it."""
    permutation, lower, upper, log_diag, sign_diag, log_scale, bias = (torch.stack(part) for part in factors)
    ones = torch.eye(lower.shape[-1], dtype=lower.dtype)
    upper = upper.triu(1) + (sign_diag * log_diag.exp()).diag_embed()
    product = (lower.tril(-1) + ones) @ upper
    matrices = torch.stack([rows[order] for rows, order in zip(product, permutation, strict=True)])
    matrices = matrices * log_scale.exp().unsqueeze(1)
    offsets = (matrices @ bias.unsqueeze(-1)).squeeze(-1)
    return matrices, offsets, log_diag.sum(1) + log_scale.sum(1)


def assert_rounded_once(actual: Tensor, truth: Tensor) -> None:
    """Relative to the largest value; in float64 the sums of the truth are rounded, too."""
    roundings = 2 if actual.dtype == torch.float32 else 64 * truth.shape[-1]
    error = (actual.double() - truth.detach()).abs().max() / truth.abs().max().clamp(min=1.0)
    assert float(error) <= roundings * torch.finfo(actual.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("count", "channels"), [(2, 1), (3, 12), (2, 33), (130, 2), (1, 300)])
def test_folded_maps(emulator: EmulatedOps, count: int, channels: int, dtype: torch.dtype) -> None:
    """More maps than a launch takes, more channels than a block has threads; and the gradients of all factors."""
    size = channels, channels

    def drawn(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) / channels**0.5 for _ in range(count)]

    orders, signs = [torch.randperm(channels) for _ in range(count)], [torch.randn(channels).sign().to(dtype)] * count
    factors = [orders, drawn(*size), drawn(*size), drawn(channels), signs, drawn(channels), drawn(channels)]
    exact = [[part.double() if part.is_floating_point() else part for part in parts] for parts in factors]
    leaves = [part.requires_grad_() for i in (1, 2, 3, 5, 6) for part in exact[i]]
    expected = folded(exact)
    found = emulator.fold(factors)
    for actual, truth in zip(found, expected, strict=True):
        assert_rounded_once(actual, truth)
    grads = [torch.randn_like(part) for part in found]
    wanted = torch.autograd.grad(expected, leaves, [grad.double() for grad in grads])
    gradients = emulator.fold_backward(factors, grads)
    for actual, first in zip(gradients, range(0, len(wanted), count), strict=True):
        assert_rounded_once(actual, torch.stack(wanted[first : first + count]))
