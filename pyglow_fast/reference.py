"""The specification of the flow in plain torch: kernels are held against it, and it runs where there are none.

All functions take x of shape (N, C, *spatial) with any number of spatial dimensions (also none), keep its dtype and
device, and are differentiable by ordinary autograd. P is the product of the spatial sizes. It is also the baseline of
the benchmarks, so it is written as good idiomatic torch: actnorm folded into the 1x1 convolution, no needless passes.

Sources: Dinh et al. 2014 (NICE), Dinh et al. 2017 (RealNVP), Kingma & Dhariwal 2018 (Glow).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast._core import float32
from pyglow_fast._core.errors import SingularMatrixError, can_read, expect
from pyglow_fast._core.float32 import CONVOLUTIONS, PRODUCTS, autocast_is_on

COUPLINGS = ("affine", "additive")
SCALE_MAPS = ("sigmoid", "exp", "tanh", "atan")
ORDERS = ("shift_scale", "scale_shift")
SPLINE_FORMS = ("softmax", "softclip")
TAILS = ("linear", "circular", "none")
MAX_BINS = 64
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "elu", "tanh", "sigmoid")
MAX_LAYERS = 6  # of a chain
KERNEL_SIZES = (1, 3, 5, 7)
LAPACK_BATCHED = 128  # largest C of matrices that are factorised in one batch on the CPU
_ATAN_GAIN = 0.636  # about 2/pi: the soft clamp of FrEIA tends to +-clamp


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context without autocast, which is for the coupling nets: the flow itself keeps its dtype."""
    device_type = x.device.type
    if not autocast_is_on(device_type):
        return contextlib.nullcontext()  # which costs a tenth
    return torch.autocast(device_type, enabled=False)


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a @ b as exactly as their dtype: in float64 where torch's settings let float32 products round.

    What the flow itself multiplies must not be rounded, and the settings, which are the process's, are not changed.
    """
    with full_precision(a):
        if float32.rounds(PRODUCTS, a):
            return (a.double() @ b.double()).to(a.dtype)
        return a @ b


class CouplingSpec(NamedTuple):
    """The kind of a coupling: affine or additive, and the map from a net's raw output to the scale.

    ``coupling`` "affine" or "additive"; ``scale_map`` one of SCALE_MAPS, or a callable raw -> (scale, log_scale);
    ``factor``, ``bias`` and ``eps`` of factor sigmoid(raw + bias) + eps (a factor of 2 and no bias in Jet); ``clamp``
    of exp(clamp tanh(raw / clamp)) and exp(clamp 0.636 atan(raw)); ``order`` "shift_scale": y = (u + shift) s, or
    "scale_shift": y = u s + shift.

    Examples:
        >>> import torch
        >>> from pyglow_fast import functional
        >>> from pyglow_fast.reference import CouplingSpec
        >>> u, net_out = torch.ones(1, 2), torch.tensor([[3.0, 0.0]])  # a shift of 3, a raw scale of 0
        >>> functional.coupling(u, net_out, CouplingSpec(scale_map="exp"))  # u1, (u2 + 3) exp(0); log s
        (tensor([[1., 4.]]), tensor([0.]))
    """

    coupling: str = "affine"
    scale_map: str | Callable[[Tensor], tuple[Tensor, Tensor]] = "sigmoid"
    bias: float = 2.0
    eps: float = 0.0
    clamp: float = 2.0
    order: str = "shift_scale"
    factor: float = 1.0


class SplineSpec(NamedTuple):
    """How the numbers of an element become the knots of its spline; see :func:`spline`.

    ``bound`` B and ``tails``: the spline maps [-B, B] to itself and is the identity outside, with derivatives of 1 at
    the ends ("linear") or of one number at both ("circular"); "none": it maps [0, 1] to itself, and is nowhere else.
    ``form`` "softmax" takes ``gain``, ``min_width``, ``min_height``, ``min_derivative`` and ``derivative_offset``,
    "softclip" takes ``slope``. With an offset of log(exp(1 - min_derivative) - 1) numbers of 0 are the identity.

    Examples:
        >>> import torch
        >>> from pyglow_fast import functional
        >>> x, raw = torch.tensor([0.5, 4.0]), torch.zeros(2, 23)  # K = 8
        >>> y, log_slope = functional.spline(x, raw, bound=5.0)
        >>> functional.spline(y, raw, bound=5.0, inverse=True)[0]
        tensor([0.5000, 4.0000])
    """

    bound: float = 3.0
    tails: str = "linear"
    form: str = "softmax"
    gain: float = 1.0
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    derivative_offset: float = 0.0
    slope: float = 1e-3

    @property
    def extra(self) -> int:
        """The numbers of an element beyond 3 K."""
        return {"linear": -1, "circular": 0, "none": 1}[self.tails]

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of what the spline maps to itself."""
        return (0.0, 1.0) if self.tails == "none" else (-self.bound, self.bound)


class Activation(NamedTuple):
    """The function behind a hidden layer of a coupling net: ``function``, one of ACTIVATIONS, and its ``parameter``.

    The parameter is the slope of "leaky_relu" below zero, 0 to 1, or the alpha of "elu", above 0; others have none.
    "gelu" is exact, "gelu_tanh" torch's approximation of it.

    Examples:
        >>> import torch
        >>> from pyglow_fast.reference import Activation, activated
        >>> activated(torch.tensor([-5.0, 3.0]), Activation("leaky_relu", 0.1))
        tensor([-0.5000,  3.0000])
    """

    function: str = "relu"
    parameter: float = 0.0


class ChainSpec(NamedTuple):
    """All of a coupling net that is a chain of layers, but for its weights; see :func:`net_chain`.

    ``activations`` of the hidden layers, all but the last; ``dilations`` of every layer, along each spatial dimension.

    Examples:
        >>> import torch
        >>> from pyglow_fast import functional
        >>> from pyglow_fast.reference import Activation, ChainSpec
        >>> spec = ChainSpec((Activation("relu"),), dilations=((), ()))  # of vectors: no spatial dimensions
        >>> weights, biases = [torch.eye(2), torch.ones(1, 2)], [torch.zeros(2), torch.zeros(1)]
        >>> functional.net_chain(torch.tensor([[3.0, -5.0]]), weights, biases, spec)  # relu(3) + relu(-5)
        tensor([[3.]])
    """

    activations: tuple[Activation, ...]
    dilations: tuple[tuple[int, ...], ...]


def lu_weight(permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign_diag: Tensor) -> Tensor:
    """W = P (tril(lower, -1) + I) (triu(upper, 1) + diag(sign_diag exp(log_diag))), rows gathered by ``permutation``.

    All arguments may carry leading batch dimensions: permutation, log_diag, sign_diag (..., C); lower, upper
    (..., C, C). (P A)[i] = A[permutation[i]]. log|det W| = sum log_diag.
    """
    product = full_product(*_lu_factors(lower, upper, log_diag, sign_diag))
    return product.gather(-2, permutation.unsqueeze(-1).expand_as(product))


def plu_weight(permutation: Tensor, lower: Tensor, upper: Tensor, log_diag: Tensor, sign_diag: Tensor) -> Tensor:
    """Compute the W of :func:`lu_weight` as (P L) U, P a matrix (C, C), the order in which other libraries multiply."""
    lower, upper = _lu_factors(lower, upper, log_diag, sign_diag)
    return full_product(full_product(permutation, lower), upper)


def _lu_factors(lower: Tensor, upper: Tensor, log_diag: Tensor, sign_diag: Tensor) -> tuple[Tensor, Tensor]:
    """L = tril(lower, -1) + I and U = triu(upper, 1) + diag(sign_diag exp(log_diag))."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    with full_precision(lower):
        diagonal = eye * (sign_diag * log_diag.exp()).unsqueeze(-1)
    return lower.tril(-1) + eye, upper.triu(1) + diagonal


def fold_actnorm(weight: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """M = W diag(exp(log_scale)), c = M bias, so that W ((x + bias) exp(log_scale)) = M x + c.

    weight (..., C, C); log_scale, bias (..., C). Returns M (..., C, C) and c (..., C).
    """
    matrix = weight * log_scale.exp().unsqueeze(-2)
    return matrix, full_product(matrix, bias.unsqueeze(-1)).squeeze(-1)


def gather_actnorm(index: Tensor, log_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Fold an actnorm into a gather: s and c of s_i x_j + c_i = exp(log_scale_j) (x_j + bias_j), j = index_i.

    It is :func:`fold_actnorm` of a permutation, without a matrix. All arguments and results (..., C).
    """
    scale = log_scale.exp()
    return scale.gather(-1, index), (scale * bias).gather(-1, index)


def check_index(index: Tensor, channels: int) -> None:
    """Refuse an index that is no permutation of the channels; its values are read where that stops no stream.

    Raises:
        ValueError: another shape or dtype, a place that there is not, or one that comes twice.
    """
    fits = tuple(index.shape) == (channels,) and index.dtype == torch.int64
    expect(fits, "index", f"shape ({channels},), int64", f"{tuple(index.shape)}, {index.dtype}")
    if can_read(index):
        whole = bool((index.sort().values == torch.arange(channels)).all())
        expect(whole, "index", f"a permutation of 0 to {channels - 1}", index.tolist())


def invert_gather(scale: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(1 / s_k, k) for the k with index_k = j, for every j: the gather that undoes s_i x_index_i. All (..., C).

    Raises:
        SingularMatrixError: a ValueError; a scale is zero (checked on the CPU only, as in :func:`invert_matrix`).
    """
    if can_read(scale) and bool((scale == 0).any()):
        raise SingularMatrixError("scale: expected scales that are not zero, found a zero")
    inverse = index.argsort(-1)
    return scale.gather(-1, inverse).reciprocal(), inverse


def transpose_map(matrix: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Transpose M, a matrix (C, C), or the scales (C,) of a gather with its index, whose M^T is a gather too."""
    if index is None:
        return matrix.T, None
    back = index.argsort()
    return matrix[back], back


def flat_positions(x: Tensor) -> Tensor:
    """View x (N, C, *spatial) as (N, C, P)."""
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)


def n_positions(x: Tensor) -> int:
    """The number of positions P, the product of the spatial sizes of x (N, C, *spatial)."""
    return math.prod(x.shape[2:])


def _matrix_product(flat: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Tensor:
    with full_precision(flat):
        # A convolution refuses zero positions, and rounds on CUDA where torch's settings are left as they come.
        if flat.numel() and not float32.rounds(CONVOLUTIONS, flat):
            return F.conv1d(flat, matrix.unsqueeze(-1), offset)
        product = full_product(matrix.expand(flat.shape[0], *matrix.shape), flat)
        return product if offset is None else product + offset.unsqueeze(-1)


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """View values (C,) so that they broadcast to x (N, C, *spatial)."""
    return value.reshape(-1, *[1] * (x.dim() - 2))


def channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, index: Tensor | None = None) -> Tensor:
    """u = M x + c at every position of x (N, C, *spatial), with matrix M (C, C) and offset c (C,).

    With an index (C,), a permutation in int64, it is a gather: u_i = matrix_i x_j + c_i, j = index_i, and matrix (C,).
    The same holds wherever an index is given beside a matrix. In a gather NaN and inf stay in their channel, while a
    product, which adds zeros times them to all others, spreads them.
    """
    if index is not None:
        check_index(index, x.shape[1])
        return torch.addcmul(per_channel(offset, x), x.index_select(1, index), per_channel(matrix, x))
    return _matrix_product(flat_positions(x), matrix, offset).reshape(x.shape)


def channel_unmix(u: Tensor, inverse_matrix: Tensor, offset: Tensor, index: Tensor | None = None) -> Tensor:
    """x = M^-1 (u - c) at every position of u (N, C, *spatial), with inverse_matrix M^-1 (C, C) and offset c (C,).

    With an index x_i = inverse_matrix_i (u_j - c_j), j = index_i: both are :func:`invert_gather`'s.
    """
    centred = u - per_channel(offset, u)
    if index is not None:
        check_index(index, u.shape[1])
        return centred.index_select(1, index) * per_channel(inverse_matrix, u)
    return _matrix_product(flat_positions(centred), inverse_matrix).reshape(u.shape)


def stacked(matrices: Tensor) -> Tensor:
    """View matrices (..., C, C) as one stack (K, C, C)."""
    return matrices.reshape(math.prod(matrices.shape[:-2]), *matrices.shape[-2:])


def _in_batches(matrices: Tensor) -> list[Tensor]:
    """(K, C, C) as batches that a LAPACK routine is called with.

    A batch of larger matrices is shared out among torch's threads, in which MKL factorises wrongly or never returns
    (seen with torch 2.13 on an AMD EPYC: C >= 150, two or more matrices, two threads); it shares out one matrix itself.
    """
    one_by_one = matrices.device.type == "cpu" and matrices.shape[-1] > LAPACK_BATCHED and matrices.shape[0] > 1
    return list(matrices) if one_by_one else [matrices]


def log_abs_det(matrices: Tensor) -> Tensor:
    """log|det M| of each matrix of (..., C, C), (...); -inf where it is singular."""
    if matrices.dim() == 2:
        return torch.linalg.slogdet(matrices).logabsdet
    batches = _in_batches(stacked(matrices))
    found = torch.cat([torch.linalg.slogdet(batch).logabsdet.reshape(-1) for batch in batches])
    return found.reshape(matrices.shape[:-2])


def invert_matrix(matrix: Tensor) -> Tensor:
    """Invert the matrix that is applied, (..., C, C): M^-1 is formed in float64 and rounded once.

    Raises:
        SingularMatrixError: a ValueError; a matrix is singular (checked on the CPU only: on CUDA the check would stop
            the stream, and a singular matrix shows as inf or NaN instead).
    """
    found = [torch.linalg.inv_ex(batch) for batch in _in_batches(stacked(matrix.double()))]
    if can_read(matrix):
        refuse_singular(any(bool(info.any()) for _, info in found))
    return torch.cat([inverse.reshape(-1) for inverse, _ in found]).reshape(matrix.shape).to(matrix.dtype)


def refuse_singular(found: bool) -> None:
    """Raise SingularMatrixError if a singular matrix was ``found`` among those to be inverted."""
    if found:
        raise SingularMatrixError("matrix: expected an invertible matrix, found a singular one")


def factor_fits(spec: CouplingSpec) -> bool:
    """Whether the factor is 1, or a positive finite number on the map that alone has one, the sigmoid."""
    has_factor = spec.coupling == "affine" and spec.scale_map == "sigmoid"
    return spec.factor == 1.0 or (has_factor and 0.0 < spec.factor < math.inf)


def scale_and_log(raw: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """Compute (s, log s) of the net's raw scale; log s directly, never as the log of an underflowed s."""
    if callable(spec.scale_map):
        return spec.scale_map(raw)
    if spec.scale_map == "sigmoid":
        z = raw + spec.bias
        scale = torch.sigmoid(z) if spec.factor == 1.0 else spec.factor * torch.sigmoid(z)
        if spec.eps > 0.0:
            scale = scale + spec.eps
            return scale, scale.log()
        return scale, F.logsigmoid(z) if spec.factor == 1.0 else math.log(spec.factor) + F.logsigmoid(z)
    if spec.scale_map == "exp":
        scale = raw.exp()
        if can_read(scale):
            finite = not bool(scale.isinf().any())
            expect(finite, "net_out", f"raw scales whose exp is finite in {scale.dtype}", "an overflow")
        return scale, raw
    if spec.scale_map == "tanh":
        log_scale = spec.clamp * torch.tanh(raw / spec.clamp)
    else:
        expect(spec.scale_map == "atan", "scale_map", f"one of {SCALE_MAPS} or a callable", repr(spec.scale_map))
        log_scale = spec.clamp * _ATAN_GAIN * torch.atan(raw)
    return log_scale.exp(), log_scale


def _halves(x: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    expect(spec.coupling in COUPLINGS, "coupling", f"one of {COUPLINGS}", repr(spec.coupling))
    expect(spec.order in ORDERS, "order", f"one of {ORDERS}", repr(spec.order))
    expect(factor_fits(spec), "factor", "1, or a positive number with the sigmoid map", spec.factor)
    net_out = net_out.to(x.dtype)  # of a net that runs in lower precision
    transformed = net_out.shape[1] // (2 if spec.coupling == "affine" else 1)
    kept, half = x.split([x.shape[1] - transformed, transformed], dim=1)
    if spec.coupling == "additive":
        return kept, half, net_out, None
    shift, raw = net_out.chunk(2, dim=1)
    return kept, half, shift, raw


def coupling(u: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """y1 = u1, y2 = (u2 + shift) s, log_det = sum log s (order "shift_scale"; additive: y2 = u2 + shift, log_det = 0).

    u (N, C, *spatial); net_out (N, 2 C2, *spatial), shift then raw scale (additive: (N, C2, *spatial)), C2 the number
    of transformed channels. Returns y like u and log_det (N,).
    """
    kept, half, shift, raw = _halves(u, net_out, spec)
    if raw is None:
        return torch.cat([kept, half + shift], dim=1), u.new_zeros(u.shape[0])
    scale, log_scale = scale_and_log(raw, spec)
    half = (half + shift) * scale if spec.order == "shift_scale" else half * scale + shift
    return torch.cat([kept, half], dim=1), log_scale.flatten(1).sum(1)


def coupling_inverse(y: Tensor, net_out: Tensor, spec: CouplingSpec) -> tuple[Tensor, Tensor]:
    """u1 = y1, u2 = y2 / s - shift, log_det = -sum log s: the inverse of :func:`coupling`, same shapes."""
    kept, half, shift, raw = _halves(y, net_out, spec)
    if raw is None:
        return torch.cat([kept, half - shift], dim=1), y.new_zeros(y.shape[0])
    scale, log_scale = scale_and_log(raw, spec)
    half = half / scale - shift if spec.order == "shift_scale" else (half - shift) / scale
    return torch.cat([kept, half], dim=1), -log_scale.flatten(1).sum(1)


def coupling_mix(
    u: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor, spec: CouplingSpec, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """M y + c of the next step, where y, log_det = coupling(u, net_out): all that lies between two coupling nets."""
    y, log_det = coupling(u, net_out, spec)
    return channel_mix(y, matrix, offset, index=index), log_det


def coupling_mix_inverse(
    y: Tensor, net_out: Tensor, inverse_matrix: Tensor, offset: Tensor, spec: CouplingSpec, index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x = M^-1 (u - c) where u, log_det = coupling_inverse(y, net_out): a whole step back except for its net."""
    u, log_det = coupling_inverse(y, net_out, spec)
    return channel_unmix(u, inverse_matrix, offset, index=index), log_det


def check_spline(x: Tensor, raw: Tensor, spec: SplineSpec) -> int:
    """Refuse settings or numbers of no spline, and return K.

    Raises:
        ValueError: an argument of the spec, or raw, is not what :func:`spline` takes.
    """
    expect(spec.tails in TAILS, "tails", f"one of {TAILS}", repr(spec.tails))
    expect(spec.form in SPLINE_FORMS, "form", f"one of {SPLINE_FORMS}", repr(spec.form))
    expect(0.0 < spec.bound < math.inf, "bound", "a positive number", spec.bound)
    expect(math.isfinite(spec.gain), "gain", "a finite number", spec.gain)
    expect(math.isfinite(spec.derivative_offset), "derivative_offset", "a finite number", spec.derivative_offset)
    expect(0.0 <= spec.min_derivative < math.inf, "min_derivative", "0 or a positive number", spec.min_derivative)
    expect(0.0 < spec.slope < 1.0, "slope", "a number between 0 and 1", spec.slope)
    shaped = raw.dim() == x.dim() + 1 and raw.shape[:-1] == x.shape
    expect(shaped, "raw", f"shape ({', '.join(map(str, x.shape))}, P)", f"shape {tuple(raw.shape)}")
    bins, rest = divmod(raw.shape[-1] - spec.extra, 3)
    if rest or not 2 <= bins <= MAX_BINS:
        found = f"{raw.shape[-1]}"
        for other in TAILS:
            fits, left = divmod(raw.shape[-1] - spec._replace(tails=other).extra, 3)
            if not left and 2 <= fits <= MAX_BINS:
                found += f" (that of {fits} bins with tails {other!r})"
        each = f"3 K{spec.extra:+d}".replace("+0", "")
        expect(False, "raw", f"a last dimension of {each} (tails {spec.tails!r}), K from 2 to {MAX_BINS}", found)
    for name, least in (("min_width", spec.min_width), ("min_height", spec.min_height)):
        expect(0.0 <= least * bins <= 1.0, name, f"0 to 1 / {bins} with {bins} bins", least)
    return bins


def check_inside(x: Tensor, spec: SplineSpec) -> None:
    """Refuse an x outside of [0, 1] where a spline has no tails; its values are read where that stops no stream.

    Raises:
        ValueError: there is one.
    """
    if spec.tails == "none" and can_read(x):
        outside = x[(x < 0) | (x > 1)]
        if outside.numel():
            expect(False, "x", "values from 0 to 1 with tails 'none'", float(outside[0]))


def _knots(raw: Tensor, least: float, spec: SplineSpec) -> tuple[Tensor, Tensor]:
    """Compute the lower edges of K bins and their sizes, (..., K) each, from the numbers of their sizes."""
    low, high = spec.interval
    if spec.form == "softmax":
        shares = least + (1.0 - least * raw.shape[-1]) * torch.softmax(raw * spec.gain, dim=-1)
    else:
        shares = torch.softmax(raw / (1.0 + (2.0 * raw / math.log(spec.slope)).abs()), dim=-1)
    edges = F.pad(low + (high - low) * shares[..., :-1].cumsum(-1), (1, 0), value=low)
    return edges, torch.cat([edges[..., 1:], torch.full_like(edges[..., :1], high)], dim=-1) - edges


def _knot_derivatives(raw: Tensor, spec: SplineSpec) -> Tensor:
    """Compute the derivatives at all knots, (..., K + 1)."""
    if spec.form == "softmax":
        found = spec.min_derivative + F.softplus(raw + spec.derivative_offset)
    else:
        found = (raw / (1.0 + (raw / math.log(spec.slope)).abs())).exp()
    if spec.tails == "linear":
        return F.pad(found, (1, 1), value=1.0)
    return torch.cat([found, found[..., :1]], dim=-1) if spec.tails == "circular" else found


def spline(x: Tensor, raw: Tensor, spec: SplineSpec | None = None, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """y = y_k + h_k (s theta^2 + d_k t) / D of each element, and log dy/dx = log(s^2 A / D^2).

    theta = (x - x_k) / w_k in the bin k of widths w and heights h that x is in, d_k the derivatives at the knots,
    s = h_k / w_k, t = theta (1 - theta), D = s + (d_k + d_(k+1) - 2 s) t and
    A = d_(k+1) theta^2 + 2 s t + d_k (1 - theta)^2. Inverse: x of y, and its log-slope.

    w = (high - low) (m + (1 - K m) softmax(gain raw_w)) and d = m_d + softplus(raw_d + derivative_offset), or in the
    form "softclip" softmax(a / (1 + abs(2 a / log slope))) and exp(a / (1 + abs(a / log slope))) of raw numbers a.

    x of any shape; raw (*x.shape, P), widths, then heights, then derivatives: P = 3 K - 1 with linear tails, 3 K with
    circular ones, 3 K + 1 with none. Returns y and the log-slope like x. NaN shows where x or any of raw is not finite.

    Raises:
        ValueError: see :func:`check_spline`; or an x outside of [0, 1] with no tails (checked on the CPU alone, on CUDA
            the result is NaN).

    References: Durkan et al. 2019 ("softmax", as nflows and normflows have it); zuko ("softclip").
    """
    spec = SplineSpec() if spec is None else spec
    bins = check_spline(x, raw, spec)
    check_inside(x, spec)
    raw = raw.to(x.dtype)
    low, high = spec.interval
    left, widths = _knots(raw[..., :bins], spec.min_width, spec)
    bottom, heights = _knots(raw[..., bins : 2 * bins], spec.min_height, spec)
    derivatives = _knot_derivatives(raw[..., 2 * bins :], spec)
    inside = (x >= low) & (x <= high)
    at = torch.where(inside, x, low)
    index = (at.unsqueeze(-1) >= (bottom if inverse else left)[..., 1:]).sum(-1, keepdim=True)
    parts = (left, widths, bottom, heights, derivatives[..., :-1], derivatives[..., 1:])
    x_k, w, y_k, h, d, d_next = (part.gather(-1, index).squeeze(-1) for part in parts)
    s = h / w
    q = d + d_next - 2.0 * s
    if inverse:
        v = at - y_k
        a, b, c = h * (s - d) + v * q, h * d - v * q, -s * v
        root = (b.square() - 4.0 * a * c).clamp(min=0.0).sqrt()
        falls = b < 0.0  # of the two forms of the root the one in which nothing cancels
        theta = torch.where(falls, root - b, 2.0 * c) / torch.where(falls, 2.0 * a, -b - root)
    else:
        theta = (at - x_k) / w
    t = theta * (1.0 - theta)
    divisor = s + q * t
    slope = s.square() * (d_next * theta.square() + 2.0 * s * t + d * (1.0 - theta).square()) / divisor.square()
    found = x_k + theta * w if inverse else y_k + h * (s * theta.square() + d * t) / divisor
    found = found + (found.clamp(low, high) - found).detach()  # where a rounding leads out, another slope holds
    log_slope = -slope.log() if inverse else slope.log()
    bad = (raw * 0.0).sum(-1)
    outside = torch.full_like(x, math.nan) if spec.tails == "none" else x
    return torch.where(inside, found, outside) + bad, torch.where(inside, log_slope, 0.0) + bad


def activated(h: Tensor, activation: Activation, in_place: bool = False) -> Tensor:
    """Apply the activation to h, by torch; in_place: a relu may overwrite h, which nobody else has."""
    function, parameter = activation
    if function == "relu" or (function == "leaky_relu" and not parameter):  # of -inf 0, and not NaN as 0 times it
        return h.relu_() if in_place else h.relu()
    if function in ("leaky_relu", "elu"):
        return getattr(F, function)(h, parameter)
    if function in ("gelu", "gelu_tanh"):
        return F.gelu(h, approximate="tanh" if function == "gelu_tanh" else "none")
    return {"none": lambda h: h, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[function](h)


def check_spec(spec: ChainSpec) -> None:
    """Refuse a description of no chain at all.

    Raises:
        ValueError: too many layers, other numbers of activations or dilations, unknown activations or parameters.
    """
    layers = len(spec.dilations)
    expect(1 <= layers <= MAX_LAYERS, "dilations", f"those of 1 to {MAX_LAYERS} layers", spec.dilations)
    expect(len(spec.activations) == layers - 1, "activations", f"{layers - 1}, of the hidden layers", spec.activations)
    for function, parameter in spec.activations:
        expect(function in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", repr(function))
        if function == "leaky_relu":
            expect(0.0 <= parameter <= 1.0, "leak", "a slope from 0 to 1", parameter)
        if function == "elu":
            expect(0.0 < parameter < math.inf, "alpha", "a number above 0", parameter)
    dims = len(spec.dilations[0])
    for dilation in spec.dilations:
        fits = len(dilation) == dims <= 3 and all(step >= 1 for step in dilation)
        expect(fits, "dilations", f"{dims} numbers of at least 1 for each layer", spec.dilations)


def check_chain(weights: Sequence[Tensor], spec: ChainSpec) -> None:
    """Refuse a description that does not fit these weights; see :func:`check_spec`.

    Raises:
        ValueError: as that, and for other layers or dimensions, or kernels of other sizes than KERNEL_SIZES.
    """
    check_spec(spec)
    layers, dims = len(spec.dilations), len(spec.dilations[0])
    expect(len(weights) == layers, "weights", f"{layers} layers", len(weights))
    for weight in weights:
        expect(weight.dim() == dims + 2, "weights", f"{dims} kernel sizes", tuple(weight.shape))
        known = all(size in KERNEL_SIZES for size in weight.shape[2:])
        expect(known, "weights", f"kernel sizes of {KERNEL_SIZES}", tuple(weight.shape))


def sides(kernel_size: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Computes the padding to each side that keeps the size: how far one convolution sees, along each dimension."""
    return tuple(step * (size // 2) for size, step in zip(kernel_size, dilation, strict=True))


def with_gain(
    weights: Sequence[Tensor], biases: Sequence[Tensor], log_gain: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Multiply the last weights and biases of a chain by exp(3 log_gain), which is less work than the output."""
    weights, biases = list(weights), list(biases)
    if log_gain is not None:
        gain = (3.0 * log_gain).exp().flatten()
        weights[-1] = weights[-1] * gain.reshape(-1, *[1] * (weights[-1].dim() - 1))
        biases[-1] = biases[-1] * gain
    return weights, biases


def net_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    spec: ChainSpec,
    log_gain: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """exp(3 log_gain) (w_L * h_(L-1) + b_L), h_l = a_l(w_l * h_(l-1) + b_l), h_0 = x, or x and cond side by side.

    The layers are convolutions that keep the size, padded by zeros; of vectors (N, C) they are matrix products.

    x (N, C_in, *spatial), up to three spatial dimensions; cond (N, C_cond, *spatial) or None; w_l (C_l, C_(l-1),
    *sizes); b_l (C_l,); log_gain: C_L elements, or None for zeros -> (N, C_L, *spatial).

    Raises:
        ValueError: see :func:`check_chain`.
    """
    check_chain(weights, spec)
    weights, biases = with_gain(weights, biases, log_gain)
    hidden = x if cond is None else torch.cat([x, cond.to(x.dtype)], dim=1)
    for layer, (weight, bias, dilation) in enumerate(zip(weights, biases, spec.dilations, strict=True)):
        if not dilation:
            hidden = F.linear(hidden, weight, bias)
        else:
            conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(dilation) - 1]
            padding = sides(weight.shape[2:], dilation)
            hidden = conv(hidden, weight, bias, padding=padding, dilation=dilation)
        if layer < len(spec.activations):
            hidden = activated(hidden, spec.activations[layer], in_place=True)
    return hidden


# Glow's own coupling net as a chain, by spatial dimensions: three convolutions with relus in between.
COUPLING_NETS = tuple(ChainSpec((Activation(), Activation()), ((1,) * dims,) * 3) for dims in range(4))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and sum of squared deviations m2 = sum (x - mean)^2 per channel, over samples and positions.

    x (N, C, *spatial) -> float64 (C,) each, zero where x is empty. Variance is m2 / (N P); sets merge by
    :func:`merge_moments`.
    """
    if x.numel() == 0:
        return (x.new_zeros(x.shape[1], dtype=torch.float64),) * 2
    variance, mean = torch.var_mean(x.double(), dim=[0, *range(2, x.dim())], correction=0)
    return mean, variance * (x.shape[0] * n_positions(x))


def merge_moments(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the mean and m2 of R sets into those of all, pair by pair (Chan, Golub & LeVeque 1983).

    mean = mean_a + d n_b / n, m2 = m2_a + m2_b + d^2 n_a n_b / n, with d = mean_b - mean_a and n = n_a + n_b.

    counts (R,), means and m2s (R, C), float64 -> (C,) each. A set may be empty.
    """
    count, mean, m2 = counts[0], means[0], m2s[0]
    for n, other, other_m2 in zip(counts[1:], means[1:], m2s[1:], strict=True):
        total = (count + n).clamp_min(1.0)
        difference = other - mean
        mean = mean + difference * (n / total)
        m2 = m2 + other_m2 + difference.square() * (count * n / total)
        count = count + n
    return mean, m2


def squeeze(x: Tensor, factor: int = 2) -> Tensor:
    """Move space into channels: (N, C, *spatial) -> (N, C factor^d, *spatial / factor), at c factor^d + block offset.

    For images this is pixel_unshuffle: out channel c*4 + 2*dh + dw. Volume-preserving, log_det = 0.

    Raises:
        ValueError: a spatial size does not divide by the factor.
    """
    n, c, *spatial = x.shape
    d = len(spatial)
    divides = all(size % factor == 0 for size in spatial)
    expect(divides, "x", f"spatial sizes divisible by {factor}", f"shape {tuple(x.shape)}")
    x = x.reshape(n, c, *[part for size in spatial for part in (size // factor, factor)])
    blocks, offsets = [2 + 2 * i for i in range(d)], [3 + 2 * i for i in range(d)]
    return x.permute(0, 1, *offsets, *blocks).reshape(n, c * factor**d, *[size // factor for size in spatial])


def unsqueeze(x: Tensor, factor: int = 2) -> Tensor:
    """Move channels back to space, which undoes :func:`squeeze`.

    Raises:
        ValueError: the channels do not divide by factor^d.
    """
    n, c, *spatial = x.shape
    d = len(spatial)
    expect(c % factor**d == 0, "x", f"channels divisible by {factor**d}", f"shape {tuple(x.shape)}")
    x = x.reshape(n, c // factor**d, *[factor] * d, *spatial)
    order = [axis for i in range(d) for axis in (2 + d + i, 2 + i)]
    return x.permute(0, 1, *order).reshape(n, c // factor**d, *[size * factor for size in spatial])


def _checkerboard(x: Tensor, parity: int) -> Tensor:
    """The positions of two rows of x (N, C, rows, *rest) whose indices have a sum of this parity: bool, (2, *rest)."""
    total = torch.arange(2, device=x.device).reshape(2, *[1] * (x.dim() - 3))
    for axis, size in enumerate(x.shape[3:], 1):
        total = total + torch.arange(size, device=x.device).reshape(size, *[1] * (x.dim() - 3 - axis))
    return total % 2 == parity


def checkerboard_split(x: Tensor, parity: int, both: bool = True) -> Tensor:
    """Divide a checkerboard: first the values at positions whose indices have a sum of ``parity``, then the rest.

    x (N, C, R, *rest), one to three spatial dimensions, R even -> (N, 2 C, R / 2, *rest), without ``both`` the first C
    channels of it. Two rows have one position of each parity in every column: [..., r, j] is that of rows 2 r, 2 r + 1.

    Raises:
        ValueError: R is odd, or there is no spatial dimension.
    """
    fits = x.dim() >= 3 and x.shape[2] % 2 == 0
    expect(fits, "x", "an even first spatial side, of two rows for each of a half", f"shape {tuple(x.shape)}")
    board = _checkerboard(x, parity)
    upper, lower = x.unflatten(2, (x.shape[2] // 2, 2)).unbind(3)
    kept = torch.where(board[0], upper, lower)
    return torch.cat([kept, torch.where(board[0], lower, upper)], dim=1) if both else kept


def checkerboard_merge(halves: Tensor, parity: int, both: bool = True) -> Tensor:
    """Undo :func:`checkerboard_split`; without ``both`` apply its transpose, with zeros at the other positions."""
    kept, other = halves.chunk(2, dim=1) if both else (halves, halves.new_zeros(()))
    board = _checkerboard(kept, parity)
    return torch.where(board, kept.unsqueeze(3), other.unsqueeze(3) if both else other).flatten(2, 3)


def gaussian_log_prob(z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """sum over a sample of log N(z; mean, exp(log_sd)), in nats.

    z (N, ...); mean and log_sd broadcast to it. Returns (N,).
    """
    terms = -0.5 * ((z - mean) * (-log_sd).exp()).square() - log_sd
    return terms.flatten(1).sum(1) - 0.5 * math.log(2.0 * math.pi) * math.prod(z.shape[1:])


def gaussian_sample(noise: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """z = mean + exp(log_sd) noise; noise (N, ...) carries the temperature, mean and log_sd broadcast to it."""
    return mean + log_sd.exp() * noise
