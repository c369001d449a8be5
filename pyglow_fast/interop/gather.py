"""A permutation of dimension 1 whose gradient is gathered too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Gather(torch.autograd.Function):
    """x[:, order]; the gradient gathers by the inverse order, where torch's own would scatter."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Like x."""
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep the orders."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Of x."""
        order, inverse = ctx.saved_tensors
        return Gather.apply(grad, inverse, order), None, None
