"""The ops of functional/ops.py by the reference and autograd, with the same names and arguments, in any dtype.

What the reference has no function for, the backward of each op, is written down here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast.functional import ops
from pyglow_fast.reference import SPLINE_FORMS, TAILS, CouplingSpec, SplineSpec

gaussian_log_prob, gaussian_sample = reference.gaussian_log_prob, reference.gaussian_sample
MAPS = {code: name for name, code in ops.SCALE_MAP_CODES.items()}


def spec_of(map_code: int, order: int, bias: float, eps: float, clamp: float, factor: float) -> CouplingSpec:
    """The coupling that the codes of an op stand for."""
    name = MAPS[map_code]
    if name == "none":
        return CouplingSpec("additive")
    name = "sigmoid" if name == "scaled_sigmoid" else name
    return CouplingSpec("affine", name, bias, eps, clamp, reference.ORDERS[order], factor)


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Zeros of what no output depends on."""
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
    return tuple(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True))


def _leaves(*values: Tensor) -> list[Tensor]:
    return [value.detach().requires_grad_() for value in values]


def _with_added(grad: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return grad
    return torch.cat([grad[:, : added.shape[1]] + added, grad[:, added.shape[1] :]], dim=1)


def _per_channel(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.dim())])


def channel_mix(
    x: Tensor, matrix: Tensor, offset: Tensor, subtract_first: bool, squeeze: int, index: Tensor | None = None
) -> Tensor:
    x = reference.squeeze(x) if squeeze == ops.SQUEEZE_CODES["input"] else x
    u = (reference.channel_unmix if subtract_first else reference.channel_mix)(x, matrix, offset, index=index)
    return reference.unsqueeze(u) if squeeze == ops.SQUEEZE_CODES["output"] else u


def channel_mix_backward(
    x: Tensor,
    grad_u: Tensor,
    matrix: Tensor,
    center: Tensor | None,
    added: Tensor | None,
    squeeze: bool,
    index: Tensor | None = None,
) -> tuple[Tensor, ...]:
    grad, leaves = _with_added(grad_u, added), _leaves(x, matrix)
    squeezed = reference.squeeze(leaves[0]) if squeeze else leaves[0]
    center = x.new_zeros(squeezed.shape[1]) if center is None else center
    u = reference.channel_unmix(squeezed, leaves[1], center, index=index)
    return (*_gradients([u], leaves, [grad]), _per_channel(grad))


def coupling(x: Tensor, net_out: Tensor, map_code: int, order: int, inverse: bool, *rest: float) -> tuple[Tensor, ...]:
    couple = reference.coupling_inverse if inverse else reference.coupling
    return couple(x, net_out, spec_of(map_code, order, *rest))


def coupling_backward(
    out: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, *codes_and_want: Any
) -> tuple[Tensor, ...]:
    map_code, order, inverse, *rest, want = codes_and_want
    leaves = _leaves(coupling(out, net_out, map_code, order, not inverse, *rest)[0], net_out)
    outputs = coupling(*leaves, map_code, order, inverse, *rest)
    grads = _gradients(outputs, leaves, [grad_out, grad_log_det])
    return (*grads, leaves[0].detach() if want else out.new_zeros(0))


def coupling_mix(
    x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor, *codes_and_index: Any
) -> tuple[Tensor, ...]:
    map_code, order, inverse, *rest = codes_and_index[:7]
    mix = reference.coupling_mix_inverse if inverse else reference.coupling_mix
    return mix(x, net_out, matrix, offset, spec_of(map_code, order, *rest), (*codes_and_index, None)[7])


def coupling_mix_backward(
    x: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, matrix: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    codes, (added, index) = rest[:6], (*rest, None)[6:8]
    leaves, grad = _leaves(x, net_out, matrix), _with_added(grad_out, added)
    outputs = reference.coupling_mix(*leaves, x.new_zeros(x.shape[1]), spec_of(*codes), index)
    return (*_gradients(outputs, leaves, [grad, grad_log_det]), _per_channel(grad))


def step_backward(
    y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, inverse_matrix: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    offset, codes, index = rest[0], rest[1:7], (*rest, None)[7]
    spec = spec_of(*codes)
    leaves = _leaves(reference.coupling_inverse(y, net_out, spec)[0], net_out)
    x = reference.channel_unmix(leaves[0].detach(), inverse_matrix, offset, index=index)
    return (x, *_gradients(reference.coupling(*leaves, spec), leaves, [grad_y, grad_log_det]))


def gaussian_log_prob_backward(z: Tensor, mean: Tensor, log_sd: Tensor, grad_log_prob: Tensor) -> tuple[Tensor, ...]:
    leaves = _leaves(z, mean, log_sd)
    return _gradients([reference.gaussian_log_prob(*leaves)], leaves, [grad_log_prob])


def _spline_spec(form: int, tails: int, numbers: Sequence[float]) -> SplineSpec:
    bound, *shares_and_slope = numbers
    return SplineSpec(bound, TAILS[tails], SPLINE_FORMS[form], *shares_and_slope)


def spline(
    x: Tensor, raw: Tensor, form: int, tails: int, inverse: bool, numbers: Sequence[float]
) -> tuple[Tensor, Tensor]:
    return reference.spline(x, raw, _spline_spec(form, tails, numbers), inverse)


def spline_backward(
    value: Tensor, raw: Tensor, grad_y: Tensor, grad_log_slope: Tensor, form: int, tails: int, inverse: bool, *rest: Any
) -> tuple[Tensor, ...]:
    numbers, from_output, want_other = rest
    spec = _spline_spec(form, tails, numbers)
    x = reference.spline(value, raw, spec, not inverse)[0] if from_output else value
    leaves = _leaves(x, raw)
    y, log_slope = reference.spline(*leaves, spec, inverse)
    other = x if from_output else y.detach()
    grads = _gradients([y, log_slope], leaves, [grad_y, grad_log_slope])
    return (*grads, other if want_other else value.new_empty(0))
