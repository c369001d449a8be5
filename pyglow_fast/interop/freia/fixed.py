"""Computes FrEIA's layers without parameters to learn: downsampling, Haar wavelets, a given 1x1 convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import FrEIA.modules as Fm
import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast._tracing import kernels_step_aside


class IRevNetDownsampling(Fm.IRevNetDownsampling):
    """A layer that moves space to channels: (N, C, H, W) -> (N, 4 C, H/2, W/2), by a copy; log_det = 0.0.

    Output channel c*4 + 2*dh + dw, or with ``legacy_backend`` (2*dh + dw)*C + c. Arguments, the constant
    ``downsample_kernel`` in the state dict and the float log-det are those of ``FrEIA.modules.IRevNetDownsampling``.

    Raises:
        ValueError: an odd side, of which FrEIA drops a row in silence; channels that do not divide by 4 (``rev``).

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import IRevNetDownsampling
        >>> down = IRevNetDownsampling([(3, 8, 8)])
        >>> (z,), log_det = down([torch.randn(2, 3, 8, 8)])
        >>> z.shape, log_det
        (torch.Size([2, 12, 4, 4]), 0.0)
    """

    def forward(
        self, x: Sequence[Tensor], c: Any = None, jac: bool = True, rev: bool = False
    ) -> tuple[tuple[Tensor], float]:
        """Map x to z, which has half the sides, or z to x with ``rev``."""
        state = x[0]
        images = state.dim() == 4 and state.shape[1] == self.channels * (4 if rev else 1)
        expected = f"images with {self.channels * (4 if rev else 1)} channels"
        expect(images, "x", expected, f"shape {tuple(state.shape)}")
        if not self.legacy_backend:
            return ((functional.unsqueeze if rev else functional.squeeze)(state),), 0.0
        # Between the two orders of channels there is a transposition of (C, 4).
        rows, columns = (4, self.channels) if rev else (self.channels, 4)
        if rev:
            state = state.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)
            return (functional.unsqueeze(state),), 0.0
        return (functional.squeeze(state).unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2),), 0.0


class IRevNetUpsampling(Fm.IRevNetUpsampling, IRevNetDownsampling):
    """The inverse of :class:`IRevNetDownsampling`: (N, 4 C, H, W) -> (N, C, 2 H, 2 W); log_det = 0.0.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import IRevNetDownsampling, IRevNetUpsampling
        >>> x = torch.randn(2, 3, 8, 8)
        >>> (z,), _ = IRevNetDownsampling([(3, 8, 8)])([x])
        >>> (back,), _ = IRevNetUpsampling([(12, 4, 4)])([z])
        >>> back.equal(x)
        True
    """


class HaarDownsampling(Fm.HaarDownsampling):
    """A layer that turns 2x2 blocks of a channel into four Haar coefficients: (N, C, H, W) -> (N, 4 C, H/2, W/2).

    Arguments, the constant ``haar_weights`` and the float log-det are those of ``FrEIA.modules.HaarDownsampling``.
    Unlike there, ``rev=True`` leaves its input as it is: FrEIA multiplies it in place.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import HaarDownsampling
        >>> (z,), log_det = HaarDownsampling([(1, 4, 4)])([torch.ones(1, 1, 4, 4)])
        >>> z[0, :, 0, 0]  # half of the sum of each 2x2 block, and no differences
        tensor([2., 0., 0., 0.])
    """

    def forward(
        self, x: Sequence[Tensor], c: Any = None, jac: bool = True, rev: bool = False
    ) -> tuple[tuple[Tensor], float]:
        """Map x to its coefficients z, or z to x with ``rev``."""
        if not rev or self.permute:  # with a permutation FrEIA changes its own copy
            return super().forward(x, c, jac, rev)
        state = x[0]
        weights = self.haar_weights * self.fac_rev
        out = F.conv_transpose2d(state, weights, stride=2, groups=self.in_channels)
        return (out,), math.prod(state.shape[1:]) * self.jac_rev


class HaarUpsampling(Fm.HaarUpsampling, HaarDownsampling):
    """The inverse of :class:`HaarDownsampling`: (N, 4 C, H, W) -> (N, C, 2 H, 2 W).

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import HaarDownsampling, HaarUpsampling
        >>> x = torch.randn(2, 1, 4, 4)
        >>> (z,), _ = HaarDownsampling([(1, 4, 4)])([x])
        >>> (back,), _ = HaarUpsampling([(4, 2, 2)])([z])
        >>> torch.allclose(back, x, atol=1e-6)
        True
    """


class Fixed1x1Conv(Fm.Fixed1x1Conv):
    """z = M x at every position, M (C, C) fixed; log_det = P log|det M|, a tensor () as in FrEIA.

    FrEIA takes M "as the convolution kernel" and applies its transpose; this one applies M. The kernel that is applied
    is what the state dict holds in both, so a checkpoint of either means the same in the other.

    Raises:
        ValueError: no M, as in FrEIA; images of another number of channels.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import Fixed1x1Conv
        >>> conv = Fixed1x1Conv([(2, 4, 4)], M=torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> (z,), log_det = conv([torch.stack([torch.full((4, 4), 3.0), torch.full((4, 4), 5.0)])[None]])
        >>> z[0, :, 0, 0], f"{log_det:.3f}"  # 16 log 2
        (tensor([10.,  3.]), '11.090')
    """

    def __init__(self, dims_in: Sequence[Sequence[int]], dims_c: Any = None, M: Tensor | None = None) -> None:
        super().__init__(dims_in, dims_c, None if M is None else M.t())

    def forward(
        self, x: Sequence[Tensor], rev: bool = False, jac: bool = True, c: Any = None
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map x to z by the matrix, or z to x with ``rev``."""
        state = x[0]
        if kernels_step_aside() or state.dtype != self.M.dtype:
            return super().forward(x, rev, jac)
        matrix = (self.M_inv if rev else self.M).flatten(1)
        images = state.dim() == 4 and state.shape[1] == matrix.shape[1]
        expect(images, "x", f"images with {matrix.shape[1]} channels", f"shape {tuple(state.shape)}")
        log_det = self.logDetM * functional.n_positions(state)
        return (functional.channel_mix(state, matrix, torch.zeros_like(matrix[0])),), -log_det if rev else log_det
