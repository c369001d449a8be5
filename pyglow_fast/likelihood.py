"""Conventions from integer images to bits per dimension, each in one place.

Levels ``0 .. n_bins-1`` are spread over [-0.5, 0.5): ``x = (level + u) / n_bins - 0.5`` with ``u`` uniform in [0, 1).
The density of ``x`` then bounds the probability of the level (Theis et al. 2016, "A note on the evaluation of
generative models"; Uria et al. 2013 for uniform dequantisation).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyglow_fast._core.errors import can_read, expect
from pyglow_fast._core.tracing import is_batched

_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch has hardly any operation on these


def _check_bins(n_bins: int) -> None:
    whole = isinstance(n_bins, int) and not isinstance(n_bins, bool)
    expect(whole, "n_bins", "an int (labels are y=)", type(n_bins).__name__)
    expect(2 <= n_bins <= 65536, "n_bins", "a value in 2..65536", n_bins)


def dequantize(
    images: Tensor,
    n_bins: int = 256,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    noise: Tensor | None = None,
) -> Tensor:
    """Spread integer grey levels v with noise: x = (v + u) / n_bins - 0.5, u ~ U[0, 1).

    Args:
        images: integer grey levels in 0..n_bins-1, any shape, any integer dtype. Not changed.
        n_bins: number of grey levels.
        generator: source of the noise; torch's default one if None.
        dtype: floating dtype of the result.
        noise: u itself, of the shape of ``images`` and of ``dtype``, where it is not to be drawn here. Not changed.

    Returns:
        Tensor of the shape of ``images`` with values in [-0.5, 0.5).

    Raises:
        ValueError: images are not integers, or hold a level outside 0..n_bins-1 (looked at on the CPU alone, as a look
            would stop a GPU's stream); noise of another shape or dtype.

    Examples:
        >>> import torch
        >>> from pyglow_fast.likelihood import dequantize, quantize
        >>> x = dequantize(torch.tensor([0, 128, 255]))
        >>> x.min() >= -0.5, x.max() < 0.5, quantize(x)  # the noise stays within a level
        (tensor(True), tensor(True), tensor([  0, 128, 255]))
    """
    _check_bins(n_bins)
    is_fine = dtype in (torch.float32, torch.float64)
    expect(is_fine, "dtype", "float32 or float64: the noise must be finer than a bin", dtype)
    expect(isinstance(images, Tensor), "images", "a Tensor", type(images).__name__)
    is_integer = not (images.is_floating_point() or images.is_complex()) and images.dtype != torch.bool
    expect(is_integer, "images", "an integer dtype (grey levels, not scaled values)", images.dtype)
    if images.dtype in _WIDE_UNSIGNED:
        images = images.long()
    if images.numel() and can_read(images):
        low, high = (int(value) for value in torch.aminmax(images))
        expect(low >= 0 and high < n_bins, "images", f"grey levels in 0..{n_bins - 1} ({n_bins=})", f"{low}..{high}")
    if noise is None:
        device = images.device if generator is None else generator.device
        noise = torch.rand(images.shape, generator=generator, device=device, dtype=dtype).to(images.device)
    else:
        fits = noise.shape == images.shape and noise.dtype == dtype
        expect(fits, "noise", f"shape {tuple(images.shape)}, {dtype}", f"{tuple(noise.shape)}, {noise.dtype}")
    # Adding the grey level, dividing and subtracting each round: up to 1.5 eps n_bins of them. Noise nearer than that
    # to the edge of its bin could end up in the next one (or at 0.5), so it stays away from the edges.
    margin = 2.0 * torch.finfo(dtype).eps * n_bins
    return noise.clamp(margin, 1.0 - margin).add_(images).div_(n_bins).sub_(0.5)


def quantize(x: Tensor, n_bins: int = 256) -> Tensor:
    """Find level = floor((x + 0.5) n_bins), clamped to 0..n_bins-1, of x: the left inverse of :func:`dequantize`.

    Args:
        x: floating values, any shape; values outside [-0.5, 0.5) go to the nearest level.
        n_bins: number of grey levels.

    Returns:
        int64 grey levels.

    Raises:
        ValueError: x is not floating or holds NaN, which has no level.
    """
    _check_bins(n_bins)
    expect(isinstance(x, Tensor), "x", "a Tensor", type(x).__name__)
    expect(x.is_floating_point(), "x", "a floating dtype", x.dtype)
    expect(not is_batched(), "x", "no torch.func.vmap around quantize, which takes any shape as it is", "one")
    if bool(x.isnan().any()):
        hint = "values that are numbers (of samples that explode: fewer at a lower temperature, not_finite lists them)"
        expect(False, "x", hint, f"NaN in {int(x.isnan().sum())} of {x.numel()} values")
    return ((x.double() + 0.5) * n_bins).floor().clamp(0, n_bins - 1).long()


def not_finite(x: Tensor) -> list[int]:
    """List the images among x (N, ...) that hold NaN or inf, which have no level; samples may, where a model explodes.

    Examples:
        >>> import torch
        >>> from pyglow_fast.likelihood import not_finite
        >>> not_finite(torch.tensor([[0.1, 0.2], [float("inf"), 0.1]]))
        [1]
    """
    return (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


def bits_per_dim(log_prob: Tensor, n_dims: int, n_bins: int = 256) -> Tensor:
    """Convert a log density: bits/dim = -log_prob / (D ln 2) + log2(n_bins).

    Args:
        log_prob: log density of the dequantised x in nats, (N,).
        n_dims: D, the number of values of one image (C*H*W).
        n_bins: number of grey levels.

    Returns:
        Bits per dimension, (N,).

    Examples:
        >>> import torch
        >>> from pyglow_fast.likelihood import bits_per_dim
        >>> bits_per_dim(torch.tensor([0.0]), n_dims=3 * 8 * 8)  # a density of 1 everywhere: 8 bits a number
        tensor([8.])
    """
    _check_bins(n_bins)
    expect(n_dims > 0, "n_dims", "a positive number", n_dims)
    return log_prob / (-n_dims * math.log(2.0)) + math.log2(n_bins)
