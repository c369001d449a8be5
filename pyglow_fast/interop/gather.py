"""Permutes dimension 1 of a tensor, and gathers in the gradient too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Gather(torch.autograd.Function):
    """A permutation x[:, order]; its gradient gathers by the inverse order, where torch's own would scatter."""

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Gather x by the order; the result has its shape."""
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        """Keep both orders for the backward."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gather the gradient by the inverse order."""
        order, inverse = ctx.saved_tensors
        return Gather.apply(grad, inverse, order), None, None
