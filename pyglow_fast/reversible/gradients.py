"""Gradients of a coupling, besides those that pass through its net, and of a channel map: by kernels or autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast import functional, ops, reference
from pyglow_fast._derivatives import check_leaves
from pyglow_fast.reference import CouplingSpec


def coupling_backward(
    u: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of u (without the net's part) and of net_out from a coupling's true input u."""
    leaves = [u.detach().requires_grad_(), net_out.detach().requires_grad_()]
    with torch.enable_grad():
        outputs = functional.coupling(leaves[0], leaves[1], spec)
    for output in outputs:
        check_leaves(output, leaves, "scale_map")
    pairs = [(out, grad) for out, grad in zip(outputs, (grad_y, grad_log_det), strict=True) if out.requires_grad]
    outs, grads = zip(*pairs, strict=True)
    grad_u, grad_net_out = torch.autograd.grad(outs, leaves, grads, materialize_grads=True)
    return grad_u, grad_net_out


def coupling_backward_from_output(
    y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a coupling's input u from its output y, and the gradients of :func:`coupling_backward`."""
    if ops.run_on(y) and ops.has_kernel(spec):
        arguments, net_out = ops.coupling_arguments(spec, inverse=False), functional.readable_net_output(net_out, y)
        grad_u, grad_net_out, u = ops.coupling_backward(y, net_out, grad_y, grad_log_det, *arguments, True)
        return u, grad_u, grad_net_out
    u, _ = functional.coupling_inverse(y, net_out, spec)
    return u, *coupling_backward(u, net_out, grad_y, grad_log_det, spec)


def channel_mix_backward(
    x: Tensor, grad_u: Tensor, matrix: Tensor, offset: Tensor, added: Tensor | None, index: Tensor | None
) -> Sequence[Tensor]:
    """Compute the gradients of u = M x + c: of x, M and c. ``added``: to the gradient of the first channels of u."""
    if ops.run_on(x):
        return ops.channel_mix_backward(x, grad_u, matrix, None, added, False, index)
    leaves = [value.detach().requires_grad_() for value in (x, matrix, offset)]
    with torch.enable_grad():
        u = reference.channel_mix(leaves[0], leaves[1], leaves[2], index=index)
    return torch.autograd.grad(u, leaves, with_added(grad_u, added))


def with_added(grad: Tensor, added: Tensor | None) -> Tensor:
    """Add to a gradient that of its first channels, if there is one."""
    if added is None:
        return grad
    total = grad.clone()
    total[:, : added.shape[1]] += added
    return total
