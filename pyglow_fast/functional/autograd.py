"""Differentiable functions over :mod:`pyglow_fast.functional.ops`, gradients formed from the saved output or input.

There are first derivatives only: differentiating a gradient raises, since the backward kernels have no derivative. Two
can be differentiated again: the gradient of a move of values is a move, that of an inverse is made of its products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.derivatives import Saved, differentiable_once
from pyglow_fast.functional import ops
from pyglow_fast.reference import SplineSpec, full_product, transpose_map

_CouplingArguments = tuple[int, int, bool, float, float, float, float]


class ChannelMix(torch.autograd.Function):
    """u = M x + c; grad_x = M^T grad_u, grad_M = sum grad_u x^T, grad_c = sum grad_u.

    ``subtract_first``: u = M (x - c), as maps are undone; then grad_M = sum grad_u (x - c)^T, grad_c = -M^T sum grad_u.
    With an index (C,) M is the scales of a gather, here and below: grad_M_i = sum grad_u_i x_j, j = index_i.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matrix: Tensor, offset: Tensor, subtract_first: bool, index: Tensor | None
    ) -> Tensor:
        """Compute u, like x."""
        ctx.save_for_backward(x, matrix, offset if subtract_first else None, index)
        return ops.channel_mix(x, matrix, offset, subtract_first, ops.SQUEEZE_CODES["none"], index)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_u: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, M and c."""
        x, matrix, center, index = saved
        if not any(ctx.needs_input_grad[1:3]):
            transposed, back = transpose_map(matrix, index)
            zeros = grad_u.new_zeros(matrix.shape[0])
            return ops.channel_mix(grad_u, transposed, zeros, False, ops.SQUEEZE_CODES["none"], back), *[None] * 4
        grad_x, grad_matrix, grad_offset = ops.channel_mix_backward(x, grad_u, matrix, center, None, False, index)
        if center is not None:
            transposed, back = transpose_map(matrix, index)
            grad_offset = -(full_product(transposed, grad_offset) if back is None else transposed * grad_offset[back])
        return grad_x, grad_matrix, grad_offset, None, None


def inverse_gradient(inverses: Tensor, grad_inverses: Tensor) -> Tensor:
    """grad_A = -A^-T grad_inverse A^-T, in float64 whatever the dtype."""
    transposed = inverses.mT.double()
    return -(transposed @ grad_inverses.double() @ transposed)


class InvertMatrices(torch.autograd.Function):
    """A^-1 and log|det A| of matrices (K, C, C); grad_A = A^-T (grad_log_det - grad_inverse A^-T).

    The products are of float64 whatever the dtype, as the inverse itself is formed, and no setting of matrix products
    makes less of them.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the inverses, like the matrices, and log|det| (K,)."""
        inverses, log_dets = ops.invert_matrices(matrices)
        ctx.save_for_backward(inverses)
        ctx.set_materialize_grads(False)
        return inverses, log_dets

    @staticmethod
    def backward(ctx: Any, grad_inverses: Tensor | None, grad_log_dets: Tensor | None) -> Tensor | None:
        """Compute the gradient of the matrices."""
        (inverses,) = ctx.saved_tensors
        grad = None if grad_log_dets is None else grad_log_dets[:, None, None] * inverses.mT.double()
        if grad_inverses is not None:
            through_inverse = inverse_gradient(inverses, grad_inverses)
            grad = through_inverse if grad is None else grad + through_inverse
        return None if grad is None else grad.to(inverses.dtype)


class Coupling(torch.autograd.Function):
    """The coupling or its inverse, with its log-det; the backward needs only its output and the net's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net_out: Tensor, arguments: _CouplingArguments) -> tuple[Tensor, Tensor]:
        """Compute the output, like x, and log_det (N,)."""
        out, log_det = ops.coupling(x, net_out, *arguments)
        ctx.save_for_backward(out, net_out)
        ctx.arguments = arguments
        return out, log_det

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_out: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of x (without what flows through the net, which autograd adds) and of the net's output."""
        out, net_out = saved
        grad_in, grad_net_out, _ = ops.coupling_backward(out, net_out, grad_out, grad_log_det, *ctx.arguments, False)
        return grad_in, grad_net_out, None


class CouplingMix(torch.autograd.Function):
    """M couple(u) + c and the coupling's log-det; the backward evaluates the coupling again, from the true u."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        net_out: Tensor,
        matrix: Tensor,
        offset: Tensor,
        arguments: _CouplingArguments,
        index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the mixed output, like u, and log_det (N,)."""
        ctx.save_for_backward(u, net_out, matrix, index)
        ctx.arguments = arguments
        return ops.coupling_mix(u, net_out, matrix, offset, *arguments, index)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_out: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of u (without what flows through the net), of the net's output, M and c."""
        u, net_out, matrix, index = saved
        scale_map, order, _, *parameters = ctx.arguments
        arguments = (u, net_out, grad_out, grad_log_det, matrix, scale_map, order, *parameters, None, index)
        return (*ops.coupling_mix_backward(*arguments), None, None)


class Spline(torch.autograd.Function):
    """The spline of each element or its inverse, and its log-slope; its backward begins from its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, raw: Tensor, spec: SplineSpec, inverse: bool) -> tuple[Tensor, Tensor]:
        """Compute the value and the log-slope, like x."""
        ctx.arguments = ops.spline_arguments(spec, inverse)
        ctx.save_for_backward(x, raw)
        return ops.spline(x, raw, *ctx.arguments)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_y: Tensor, grad_log_slope: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of x and raw."""
        grad_x, grad_raw, _ = ops.spline_backward(*saved, grad_y, grad_log_slope, *ctx.arguments, False, False)
        return grad_x, grad_raw, None, None


class NetChain(torch.autograd.Function):
    """exp(3 log_gain) (w_L * h_(L-1) + b_L), h_l = a_l(w_l * h_(l-1) + b_l), as matrix products.

    Keeps x, cond and the hidden layers. ``arguments`` are the ops': of ops.chain_arguments, and whether in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cond: Tensor | None, log_gain: Tensor | None, arguments: tuple[Any, ...], *layers: Tensor
    ) -> Tensor:
        """Compute the net's output (N, C_out, *spatial); layers: all weights, then all biases."""
        count = len(layers) // 2
        weights, biases = layers[:count], layers[count:]
        out, kept = ops.net_chain(x, cond, weights, biases, log_gain, *arguments, True)
        ctx.arguments = arguments
        ctx.save_for_backward(x, cond, kept, log_gain, biases[-1], *weights)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of x, cond, the gain, the weights and the biases."""
        x, cond, kept, log_gain, bias, *weights = saved
        want_weights = any((ctx.needs_input_grad[2], *ctx.needs_input_grad[4:]))
        found = ops.net_chain_backward(grad_out, x, cond, kept, weights, bias, log_gain, *ctx.arguments, want_weights)
        grads = list(found)  # torch.compile of torch 2.12 takes the rest of an unpacking for a tuple
        grad_x = grads.pop(0)
        grad_cond = None if cond is None else grads.pop(0)
        grad_gain = None if log_gain is None or not want_weights else grads.pop()
        return (grad_x, grad_cond, grad_gain, None, *(grads or [None] * (2 * len(weights))))


class GaussianLogProb(torch.autograd.Function):
    """log N(z; mean, exp(log_sd)) summed per sample; mean and log_sd are of the shape of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
        """Sum the log density of each sample, (N,), nats."""
        ctx.save_for_backward(z, mean, log_sd)
        return ops.gaussian_log_prob(z, mean, log_sd)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Saved, grad_log_prob: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients of z, mean and log_sd."""
        return ops.gaussian_log_prob_backward(*saved, grad_log_prob)


class CheckerboardMove(torch.autograd.Function):
    """A checkerboard in two halves, or its first half, and back; the gradient goes where the values came from.

    Halves are put together by the inverse; the first one alone by the transpose, with zeros at the other positions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parity: int, both: bool, splits: bool) -> Tensor:
        """Gather halves (N, C or 2 C, rows / 2, *rest), or of these put (N, C, rows, *rest) together."""
        ctx.arguments = parity, both, not splits
        return (ops.checkerboard_split if splits else ops.checkerboard_merge)(x, parity, both)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Move the gradient back."""
        return CheckerboardMove.apply(grad, *ctx.arguments), None, None, None
