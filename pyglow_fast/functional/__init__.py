"""The flow step's operations as stateless functions: compiled kernels where they apply, the reference elsewhere.

Tensors are (N, C, *spatial); P is the product of the spatial sizes. Every function is differentiable in all its tensor
arguments. :mod:`pyglow_fast.reference` states the equations in functions of the same names and arguments. Read this
file first, then ops.py, which declares the kernels to torch. The folder may import _core and reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast._core import backend
from pyglow_fast._core.derivatives import apply
from pyglow_fast._core.dry import device_of
from pyglow_fast._core.errors import can_read
from pyglow_fast.functional import autograd, ops
from pyglow_fast.reference import (
    Activation,
    ChainSpec,
    CouplingSpec,
    SplineSpec,
    n_positions,
    per_channel,
    squeeze,
    unsqueeze,
)

__all__ = [
    "Activation",
    "ChainSpec",
    "CouplingSpec",
    "SplineSpec",
    "actnorm",
    "actnorm_inverse",
    "channel_linear",
    "channel_linear_inverse",
    "channel_mix",
    "channel_unmix",
    "checkerboard_merge",
    "checkerboard_split",
    "coupling",
    "coupling_inverse",
    "coupling_mix",
    "coupling_mix_inverse",
    "gaussian_log_prob",
    "gaussian_sample",
    "invert_matrix",
    "log_abs_det",
    "n_positions",
    "net_chain",
    "spline",
    "squeeze",
    "unsqueeze",
]


def _records_gradient(*tensors: Tensor) -> bool:
    """Tell whether autograd records what is computed from these tensors, so that each kernel needs a backward."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_seen(*tensors: Tensor) -> bool:
    """Whether autograd or torch.compile must see an autograd function of these tensors in place of the op alone."""
    return torch.compiler.is_compiling() or _records_gradient(*tensors)


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, index: Tensor | None = None) -> Tensor:
    """u = M x + c at every position, or with an index a gather; see :func:`pyglow_fast.reference.channel_mix`."""
    if not ops.run_on(x):
        return reference.channel_mix(x, matrix, offset, index)
    if _is_seen(x, matrix, offset):
        return apply(autograd.ChannelMix, x, matrix, offset, False, index)
    return ops.channel_mix(x, matrix, offset, False, ops.SQUEEZE_CODES["none"], index)


def channel_unmix(u: Tensor, inverse_matrix: Tensor, offset: Tensor, index: Tensor | None = None) -> Tensor:
    """x = M^-1 (u - c) at every position; see :func:`pyglow_fast.reference.channel_unmix`."""
    if not ops.run_on(u):
        return reference.channel_unmix(u, inverse_matrix, offset, index)
    return apply(autograd.ChannelMix, u, inverse_matrix, offset, True, index)


def coupling(u: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """y2 = (u2 + shift) s, log_det = sum log s; see :func:`pyglow_fast.reference.coupling`."""
    return _coupled(u, net_out, spec, inverse=False)


def coupling_inverse(y: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """u2 = y2 / s - shift, log_det = -sum log s; see :func:`pyglow_fast.reference.coupling_inverse`."""
    return _coupled(y, net_out, spec, inverse=True)


def _coupled(x: Tensor, net_out: Tensor, spec: CouplingSpec, inverse: bool) -> tuple[Tensor, Tensor]:
    if not ops.run_on(x) or not ops.has_kernel(spec):
        return (reference.coupling_inverse if inverse else reference.coupling)(x, net_out, spec)
    net_out, arguments = readable_net_output(net_out, x), ops.coupling_arguments(spec, inverse)
    if _is_seen(x, net_out):
        return apply(autograd.Coupling, x, net_out, arguments)
    return ops.coupling(x, net_out, *arguments)


def spline(
    x: Tensor,
    raw: Tensor,
    *,
    bound: float = 3.0,
    tails: str = "linear",
    form: str = "softmax",
    gain: float = 1.0,
    min_width: float = 1e-3,
    min_height: float = 1e-3,
    min_derivative: float = 1e-3,
    derivative_offset: float = 0.0,
    slope: float = 1e-3,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = y_k + h_k (s theta^2 + d_k t) / D of each element, and log dy/dx, nats: a monotone rational-quadratic spline.

    x of any shape, float32 or float64; raw (*x.shape, P), like x or of 16 bits; y and the log-slope are like x.
    Equation, errors and paper stand at :func:`pyglow_fast.reference.spline`; the keywords, but for ``inverse``, are the
    fields of :class:`SplineSpec`. It is differentiable once.
    """
    numbers = (gain, min_width, min_height, min_derivative, derivative_offset, slope)
    spec = SplineSpec(bound, tails, form, *numbers)
    if not ops.run_on(x):
        return reference.spline(x, raw, spec, inverse)
    reference.check_spline(x, raw, spec)
    reference.check_inside(x, spec)
    raw = readable_net_output(raw, x)
    if _is_seen(x, raw):
        return apply(autograd.Spline, x, raw, spec, inverse)
    return ops.spline(x, raw, *ops.spline_arguments(spec, inverse))


def readable_net_output(net_out: Tensor, state: Tensor) -> Tensor:
    """Cast a net's output if kernels cannot read it: they take the state's dtype, or 16 bits beside float32."""
    if state.dtype == torch.float32 and net_out.dtype in (torch.bfloat16, torch.float16):
        return net_out
    return net_out.to(state.dtype)


def coupling_mix(
    u: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor, spec: CouplingSpec, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """M y + c with y, log_det = coupling(u, net_out), in one pass; see :func:`pyglow_fast.reference.coupling_mix`."""
    if not ops.run_on(u) or not ops.has_kernel(spec):
        y, log_det = coupling(u, net_out, spec)
        return channel_mix(y, matrix, offset, index), log_det
    arguments, net_out = ops.coupling_arguments(spec, inverse=False), readable_net_output(net_out, u)
    if _is_seen(u, net_out, matrix, offset):
        return apply(autograd.CouplingMix, u, net_out, matrix, offset, arguments, index)
    return ops.coupling_mix(u, net_out, matrix, offset, *arguments, index)


def coupling_mix_inverse(
    y: Tensor, net_out: Tensor, inverse_matrix: Tensor, offset: Tensor, spec: CouplingSpec, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """M^-1 (u - c) with u, log_det = coupling_inverse(y, net_out); one pass where no gradient is recorded.

    See :func:`pyglow_fast.reference.coupling_mix_inverse`.
    """
    records = _records_gradient(y, net_out, inverse_matrix, offset)
    if ops.run_on(y) and ops.has_kernel(spec) and not records:
        arguments = ops.coupling_arguments(spec, inverse=True)
        return ops.coupling_mix(y, readable_net_output(net_out, y), inverse_matrix, offset, *arguments, index)
    u, log_det = coupling_inverse(y, net_out, spec)
    return channel_unmix(u, inverse_matrix, offset, index), log_det


def invert_matrix(matrix: Tensor) -> Tensor:
    """M^-1 of each matrix of (..., C, C), formed in float64; see :func:`pyglow_fast.reference.invert_matrix`."""
    if not ops.run_on(matrix):
        return reference.invert_matrix(matrix)
    inverses, log_dets = _inverted(matrix)
    if can_read(matrix):
        reference.refuse_singular(bool((log_dets == -math.inf).any()))
    return inverses.reshape(matrix.shape)


def log_abs_det(matrices: Tensor) -> Tensor:
    """log|det M| of each matrix of (..., C, C), formed in float64; see :func:`pyglow_fast.reference.log_abs_det`."""
    if not ops.run_on(matrices):
        return reference.log_abs_det(matrices)
    return _inverted(matrices)[1].reshape(matrices.shape[:-2])


def _inverted(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses (K, C, C) and log|det| (K,) of the K matrices of (..., C, C)."""
    stacked = reference.stacked(matrices)
    return apply(autograd.InvertMatrices, stacked) if _is_seen(matrices) else ops.invert_matrices(stacked)


def checkerboard_split(x: Tensor, parity: int, both: bool = True) -> Tensor:
    """Divide a checkerboard into its halves; see :func:`pyglow_fast.reference.checkerboard_split`."""
    return _moved(x, parity, both, splits=True)


def checkerboard_merge(halves: Tensor, parity: int, both: bool = True) -> Tensor:
    """Join two halves to a checkerboard; see :func:`pyglow_fast.reference.checkerboard_merge`."""
    return _moved(halves, parity, both, splits=False)


def _moved(x: Tensor, parity: int, both: bool, splits: bool) -> Tensor:
    """The values of a checkerboard or its halves; there are kernels for them on the CPU."""
    if device_of(x).type != "cpu" or not 3 <= x.dim() <= 5 or not ops.run_on(x):
        return (reference.checkerboard_split if splits else reference.checkerboard_merge)(x, parity, both)
    if _is_seen(x):
        return apply(autograd.CheckerboardMove, x, parity, both, splits)
    return (ops.checkerboard_split if splits else ops.checkerboard_merge)(x, parity, both)


def net_by_kernels(x: Tensor) -> bool:
    """Tells whether :func:`net_chain` on x is matrix products of ours, and not the library's convolutions.

    It is on the CPU, where Glow's nets are faster so than the library's layers at their best, and keep half as much
    (docs/speed.md), unless PYGLOW_NETS in the environment says otherwise. Under autocast to bfloat16 too, of a float32
    x: see :func:`net_in_half`; autocast to float16 is the library's.
    """
    if device_of(x).type != "cpu" or not 2 <= x.dim() <= 5 or not ops.run_on(x) or backend.nets() != "auto":
        return False
    return not torch.is_autocast_enabled("cpu") or net_in_half(x)


def net_by_library(x: Tensor) -> bool:
    """Tells whether csrc/run computes nets on x by the library's convolutions or products, without autograd.

    It does on a GPU, and on the CPU where PYGLOW_NETS in the environment is "library" or "rows".
    """
    if torch.compiler.is_compiling() or not 3 <= x.dim() <= 5 or not ops.run_on(x):
        return False
    return device_of(x).type == "cuda" or backend.nets() != "auto"


def net_in_half(x: Tensor) -> bool:
    """Tells whether the products of :func:`net_chain` on x are of bfloat16 numbers: under autocast to that."""
    if not torch.is_autocast_enabled("cpu") or x.dtype != torch.float32 or device_of(x).type != "cpu":
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16


def net_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: ChainSpec,
    log_gain: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """Run a coupling net that is a chain of convolutions or linear layers.

    See :func:`pyglow_fast.reference.net_chain`. Computed by this package's matrix products the output is float32, also
    under autocast to bfloat16, where the activations between the layers, and what is multiplied, are rounded to that.
    Computed by torch's convolutions it has autocast's dtype.
    """
    if not net_by_kernels(x):
        return reference.net_chain(x, weights, biases, spec, log_gain, cond)
    half = net_in_half(x)
    if half:  # autocast takes inputs and parameters of any dtype
        weights, biases = [value.to(x.dtype) for value in weights], [value.to(x.dtype) for value in biases]
        log_gain, cond = (None if value is None else value.to(x.dtype) for value in (log_gain, cond))
    arguments = (*ops.chain_arguments(spec), half)
    optional = [tensor for tensor in (log_gain, cond) if tensor is not None]
    if _records_gradient(x, *weights, *biases, *optional):
        return apply(autograd.NetChain, x, cond, log_gain, arguments, *weights, *biases)
    return ops.net_chain(x, cond, weights, biases, log_gain, *arguments, False)[0]


def gaussian_log_prob(z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """log N(z; mean, exp(log_sd)) summed per sample; see :func:`pyglow_fast.reference.gaussian_log_prob`."""
    if ops.run_on(z):
        arguments = z, mean.expand_as(z), log_sd.expand_as(z)
        if _is_seen(*arguments):
            return apply(autograd.GaussianLogProb, *arguments)
        return ops.gaussian_log_prob(*arguments)
    return reference.gaussian_log_prob(z, mean, log_sd)


def gaussian_sample(noise: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """z = mean + exp(log_sd) noise; see :func:`pyglow_fast.reference.gaussian_sample`."""
    if ops.run_on(noise) and not _records_gradient(noise, mean, log_sd):
        return ops.gaussian_sample(noise, mean.expand_as(noise), log_sd.expand_as(noise))
    return reference.gaussian_sample(noise, mean, log_sd)


def summed(log_dets: Sequence[Tensor]) -> Tensor:
    """Sum the log-dets (N,) of functions that follow one another; a single one is returned as it is."""
    return log_dets[0] if len(log_dets) == 1 else torch.stack(list(log_dets)).sum(0)


def per_sample(x: Tensor, log_det: Tensor) -> Tensor:
    """Spread P log_det, the same for each of the N samples, to (N,)."""
    return (log_det * n_positions(x)).expand(x.shape[0])


def channel_linear(x: Tensor, weight: Tensor, weight_log_det: Tensor) -> tuple[Tensor, Tensor]:
    """z = W x at every position, log_det = P log|det W|, for weight W (C, C) and its weight_log_det ()."""
    return channel_mix(x, weight, weight.new_zeros(weight.shape[0])), per_sample(x, weight_log_det)


def channel_linear_inverse(z: Tensor, weight: Tensor, weight_log_det: Tensor) -> tuple[Tensor, Tensor]:
    """x = W^-1 z at every position, the inverse of :func:`channel_linear`; log_det = -P log|det W|."""
    x = channel_unmix(z, invert_matrix(weight), weight.new_zeros(weight.shape[0]))
    return x, per_sample(z, -weight_log_det)


def actnorm(x: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """z = (x + bias) exp(log_scale) per channel, log_det = P sum log_scale; log_scale and bias are (C,)."""
    scale = log_scale.exp()
    z = torch.addcmul(per_channel(bias * scale, x), x, per_channel(scale, x))
    return z, per_sample(x, log_scale.sum())


def actnorm_inverse(z: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x = z exp(-log_scale) - bias, the inverse of :func:`actnorm`; log_det = -P sum log_scale."""
    x = torch.addcmul(per_channel(-bias, z), z, per_channel((-log_scale).exp(), z))
    return x, per_sample(z, -log_scale.sum())
