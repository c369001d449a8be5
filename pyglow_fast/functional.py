"""The flow step's operations as stateless functions: compiled kernels where they apply, the reference elsewhere.

Tensors are (N, C, *spatial); P is the product of the spatial sizes. Every function is differentiable in all its tensor
arguments. The equations are stated once, in :mod:`pyglow_fast.reference`, whose functions have the same names and
arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyglow_fast import autograd, ops, reference
from pyglow_fast.reference import (
    CouplingSpec,
    fold_actnorm,
    gaussian_log_prob,
    gaussian_sample,
    invert_matrix,
    n_positions,
    squeeze,
    unsqueeze,
)

__all__ = [
    "CouplingSpec",
    "actnorm",
    "actnorm_inverse",
    "channel_linear",
    "channel_linear_inverse",
    "channel_mix",
    "channel_unmix",
    "coupling",
    "coupling_inverse",
    "fold_actnorm",
    "gaussian_log_prob",
    "gaussian_sample",
    "invert_matrix",
    "n_positions",
    "squeeze",
    "unsqueeze",
]


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """u = M x + c at every position; see :func:`pyglow_fast.reference.channel_mix`."""
    if ops.run_on(x):
        return autograd.ChannelMix.apply(x, matrix, offset)
    return reference.channel_mix(x, matrix, offset)


def channel_unmix(u: Tensor, inverse_matrix: Tensor, offset: Tensor) -> Tensor:
    """x = M^-1 (u - c) at every position; see :func:`pyglow_fast.reference.channel_unmix`."""
    if ops.run_on(u):
        return autograd.ChannelUnmix.apply(u, inverse_matrix, offset)
    return reference.channel_unmix(u, inverse_matrix, offset)


def coupling(u: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """y2 = (u2 + shift) s, log_det = sum log s; see :func:`pyglow_fast.reference.coupling`."""
    if ops.run_on(u) and ops.has_kernel(spec):
        return autograd.Coupling.apply(u, net_out, ops.kind_arguments(spec, inverse=False))
    return reference.coupling(u, net_out, spec)


def coupling_inverse(y: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """u2 = y2 / s - shift, log_det = -sum log s; see :func:`pyglow_fast.reference.coupling_inverse`."""
    if ops.run_on(y) and ops.has_kernel(spec):
        return autograd.Coupling.apply(y, net_out, ops.kind_arguments(spec, inverse=True))
    return reference.coupling_inverse(y, net_out, spec)


def _per_sample(x: Tensor, log_det: Tensor) -> Tensor:
    """P log_det, the same for each of the N samples: (N,)."""
    return (log_det * n_positions(x)).expand(x.shape[0])


def channel_linear(x: Tensor, weight: Tensor, weight_log_det: Tensor) -> tuple[Tensor, Tensor]:
    """z = W x, log_det = P log|det W|. weight (C, C), weight_log_det () -> z like x, log_det (N,)."""
    return channel_mix(x, weight, weight.new_zeros(weight.shape[0])), _per_sample(x, weight_log_det)


def channel_linear_inverse(z: Tensor, weight: Tensor, weight_log_det: Tensor) -> tuple[Tensor, Tensor]:
    """x = W^-1 z, log_det = -P log|det W|."""
    x = channel_unmix(z, invert_matrix(weight), weight.new_zeros(weight.shape[0]))
    return x, _per_sample(z, -weight_log_det)


def _per_channel(x: Tensor, value: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.dim() - 2))


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """z = (x + bias) exp(log_scale), log_det = P sum log_scale. log_scale, bias (C,) -> z like x, log_det (N,)."""
    scale = log_scale.exp()
    z = torch.addcmul(_per_channel(x, bias * scale), x, _per_channel(x, scale))
    return z, _per_sample(x, log_scale.sum())


def actnorm_inverse(z: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x = z exp(-log_scale) - bias, log_det = -P sum log_scale."""
    x = torch.addcmul(_per_channel(z, -bias), z, _per_channel(z, (-log_scale).exp()))
    return x, _per_sample(z, -log_scale.sum())
