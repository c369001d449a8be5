"""Backward passes of a flow step outside its net: one kernel each, or autograd through the reference.

Shapes and equations are in csrc/core.h; ``added`` is what the net's backward adds to the gradient of the kept channels;
with an ``index`` the matrix is the scales of a gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyglow_fast import functional, ops, reference
from pyglow_fast._derivatives import check_leaves
from pyglow_fast.reference import CouplingSpec


def _gradients(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], output_grads: Sequence[Tensor]
) -> list[Tensor]:
    """Of a function's inputs, by autograd; zero for those that it does not use."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    for out in outputs:
        check_leaves(out, leaves, "scale_map")
    pairs = [(out, grad) for out, grad in zip(outputs, output_grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad(
        [out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True, materialize_grads=True
    )
    return list(found)


def _compiled(x: Tensor, spec: CouplingSpec) -> bool:
    return ops.run_on(x) and ops.has_kernel(spec)


def _forward_arguments(spec: CouplingSpec) -> tuple[int, int, float, float, float, float]:
    scale_map, order, _, *numbers = ops.coupling_arguments(spec, inverse=False)
    bias, eps, clamp, factor = numbers
    return scale_map, order, bias, eps, clamp, factor


def _whole(grad: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return grad
    total = grad.clone()
    total[:, : added.shape[1]] += added
    return total


def step_backward(
    y: Tensor,
    net_out: Tensor,
    grad_y: Tensor,
    grad_log_det: Tensor,
    inverse_matrix: Tensor,
    offset: Tensor,
    spec: CouplingSpec,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a step's input x from its output y, and gradients of u = M x + c (without the net's part) and net_out."""
    if _compiled(y, spec):
        arguments = _forward_arguments(spec)
        net_out = functional.readable_net_output(net_out, y)
        return ops.step_backward(y, net_out, grad_y, grad_log_det, inverse_matrix, offset, *arguments, index)
    u, _ = functional.coupling_inverse(y, net_out, spec)
    grad_u, grad_net_out = _gradients(
        lambda u, net_out: reference.coupling(u, net_out, spec), [u, net_out], [grad_y, grad_log_det]
    )
    return functional.channel_unmix(u, inverse_matrix, offset, index=index), grad_u, grad_net_out


def coupling_backward_from_output(
    y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a coupling's input u from its output y, and gradients of u (without the net's part) and net_out."""
    if _compiled(y, spec):
        arguments, net_out = ops.coupling_arguments(spec, inverse=False), functional.readable_net_output(net_out, y)
        grad_u, grad_net_out, u = ops.coupling_backward(y, net_out, grad_y, grad_log_det, *arguments, True)
        return u, grad_u, grad_net_out
    u, _ = functional.coupling_inverse(y, net_out, spec)
    return u, *coupling_backward(u, net_out, grad_y, grad_log_det, spec)


def coupling_backward(
    u: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """Compute gradients of u (without the net's part) and of net_out from a coupling's true input u."""
    if _compiled(u, spec):
        arguments = ops.coupling_arguments(spec, inverse=False)
        net_out = functional.readable_net_output(net_out, u)
        y, _ = ops.coupling(u, net_out, *arguments)
        grad_u, grad_net_out, _ = ops.coupling_backward(y, net_out, grad_y, grad_log_det, *arguments, False)
        return grad_u, grad_net_out
    grad_u, grad_net_out = _gradients(
        lambda u, net_out: reference.coupling(u, net_out, spec), [u, net_out], [grad_y, grad_log_det]
    )
    return grad_u, grad_net_out


def coupling_mix_backward(
    u: Tensor,
    net_out: Tensor,
    grad_out: Tensor,
    grad_log_det: Tensor,
    matrix: Tensor,
    offset: Tensor,
    spec: CouplingSpec,
    added: Tensor | None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of out = M couple(u) + c: of u (without the net's part), net_out, M and c."""
    if _compiled(u, spec):
        net_out = functional.readable_net_output(net_out, u)
        arguments = _forward_arguments(spec)
        return ops.coupling_mix_backward(u, net_out, grad_out, grad_log_det, matrix, *arguments, added, index)
    grad_u, grad_net_out, grad_matrix, grad_offset = _gradients(
        lambda u, net_out, matrix, offset: reference.coupling_mix(u, net_out, matrix, offset, spec, index),
        [u, net_out, matrix, offset],
        [_whole(grad_out, added), grad_log_det],
    )
    return grad_u, grad_net_out, grad_matrix, grad_offset


def channel_mix_backward(
    x: Tensor,
    grad_u: Tensor,
    matrix: Tensor,
    offset: Tensor,
    added: Tensor | None,
    squeeze_first: bool,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of u = M x + c: of x, M and c."""
    if ops.run_on(x) and (x.dim() == 4 or not squeeze_first):
        return ops.channel_mix_backward(x, grad_u, matrix, None, added, squeeze_first, index)
    grad_x, grad_matrix, grad_offset = _gradients(
        lambda x, matrix, offset: (reference.channel_mix(x, matrix, offset, squeeze_first, index),),
        [x, matrix, offset],
        [_whole(grad_u, added)],
    )
    return grad_x, grad_matrix, grad_offset
