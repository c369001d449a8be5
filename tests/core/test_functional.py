"""The public functions that no kernel of their own computes, and what all refuse; of the others see tests/kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import assert_close, jacobian, log_abs_det
from support.reference_cases import invertible, randn
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast.reference import CouplingSpec

SHAPES = [(3, 4), (2, 4, 5), (2, 6, 3, 2), (1, 2, 1, 7), (2, 2, 3, 1, 2)]


@pytest.mark.parametrize("field", ["coupling", "order", "scale_map"])
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_an_unknown_option_is_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: expected one of .* found 'other'"):
        getattr(functional, name)(randn(2, 4), randn(2, 4), CouplingSpec(**{field: "other"}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_actnorm(shape: tuple[int, ...]) -> None:
    x, log_scale, bias = randn(*shape), 0.3 * randn(shape[1]), randn(shape[1])
    z, log_det = functional.actnorm(x, log_scale, bias)
    column = (-1, *[1] * (len(shape) - 2))
    assert_close(z, (x + bias.reshape(column)) * log_scale.reshape(column).exp())
    derivative = jacobian(lambda values: functional.actnorm(values, log_scale, bias)[0], x)
    assert_close(log_det, log_abs_det(derivative), condition=4.0 * x[0].numel())
    again, inverse_log_det = functional.actnorm_inverse(z, log_scale, bias)
    assert_close(again, x)
    assert torch.equal(inverse_log_det, -log_det)
    leaves = [value.requires_grad_() for value in (x, log_scale, bias)]
    assert torch.autograd.gradcheck(functional.actnorm, leaves)
    assert torch.autograd.gradcheck(functional.actnorm_inverse, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channel_linear(shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape), invertible(shape[1])
    weight_log_det = torch.linalg.slogdet(weight).logabsdet
    z, log_det = functional.channel_linear(x, weight, weight_log_det)
    assert_close(z, torch.einsum("ij,nj...->ni...", weight, x))
    derivative = jacobian(lambda values: functional.channel_linear(values, weight, weight_log_det)[0], x)
    assert_close(log_det, log_abs_det(derivative), condition=4.0 * x[0].numel())
    again, inverse_log_det = functional.channel_linear_inverse(z, weight, weight_log_det)
    assert_close(again, x, condition=4.0)
    assert torch.equal(inverse_log_det, -log_det)
    leaves = [value.requires_grad_() for value in (x, weight)]

    def through_the_weight(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda values, matrix: function(values, matrix, torch.linalg.slogdet(matrix).logabsdet)

    assert torch.autograd.gradcheck(through_the_weight(functional.channel_linear), leaves)
    assert torch.autograd.gradcheck(through_the_weight(functional.channel_linear_inverse), leaves)
