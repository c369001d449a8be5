"""Computes FrEIA's coupling blocks: one kernel each besides the nets, which this package's executor runs if it can."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import FrEIA.modules as Fm
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop import nets
from pyglow_fast.interop.freia.layout import (
    ShiftThenRaw,
    clamped_spec,
    for_kernels,
    importable,
    net_output,
    side_by_side,
)

Dims = Sequence[Sequence[int]]
Subnet = Callable[[int, int], nn.Module]


def _affine(
    block: Any,
    subnet: nn.Module,
    passive: Tensor,
    state: Tensor,
    transformed: int,
    rev: bool,
    cond: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The last ``transformed`` channels of the state scaled and shifted by subnet(passive), or back; log_det (N,).

    With a condition, by subnet([passive, cond]).
    """
    spec, raw_gain = clamped_spec(block.clamp, block.f_clamp)
    net_out = net_output(subnet, passive, state, ShiftThenRaw(transformed, 1.0, raw_gain), cond)
    return (functional.coupling_inverse if rev else functional.coupling)(state, net_out, spec)


class GLOWCouplingBlock(Fm.GLOWCouplingBlock):
    """y1 = x1 exp(s2) + t2, y2 = x2 exp(s1) + t1, with (s2, t2) of subnet2(x2, c) and (s1, t1) of subnet1(y1, c).

    s = clamp f(the net's s); log_det = sum s1 + sum s2, (N,); its negative with ``rev=True``. Arguments, parameters
    and errors are those of ``FrEIA.modules.GLOWCouplingBlock``. Vectors, other dtypes than float32 and float64, and
    whatever runs inside torch.func take FrEIA's own arithmetic.

    Unlike FrEIA's: it can be pickled. A subnet's output of another shape than (N, 2 C_half, *spatial) is a ValueError.
    Under autocast the log-det stays in the dtype of x. Gradients cannot be differentiated again (an error says so).

    Shapes: x ((N, C, *spatial),), c of conditions (N, C_c, *spatial).

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import GLOWCouplingBlock
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> block = GLOWCouplingBlock([(4, 8, 8)], subnet_constructor=subnet)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> (y,), log_det = block([x])
        >>> (back,), minus = block([y], rev=True)
        >>> torch.allclose(back, x, atol=1e-4), torch.allclose(log_det, -minus, atol=1e-3)
        (True, True)
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims = (),
        subnet_constructor: Subnet | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable[[Tensor], Tensor] = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, subnet_constructor, clamp, clamp_activation, split_len)
        self.f_clamp: Callable[[Tensor], Tensor] = importable(self.f_clamp)

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        if not for_kernels(x1):
            return super()._coupling1(x1, u2, rev)
        return _affine(self, self.subnet2, u2, x1, self.split_len1, rev)

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        if not for_kernels(x2):
            return super()._coupling2(x2, u1, rev)
        return _affine(self, self.subnet1, u1, x2, self.split_len2, rev)


class AffineCouplingOneSided(Fm.AffineCouplingOneSided):
    """y1 = x1, y2 = x2 exp(s) + t with (s, t) of subnet(x1, c), s = clamp f(the net's s); log_det = sum s, (N,).

    Arguments, parameters and errors are those of ``FrEIA.modules.AffineCouplingOneSided``; where it differs: see
    :class:`GLOWCouplingBlock`.

    Shapes: x ((N, C, *spatial),), c of conditions (N, C_c, *spatial).

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import AffineCouplingOneSided
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> block = AffineCouplingOneSided([(4, 8, 8)], subnet_constructor=subnet)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> (y,), log_det = block([x])
        >>> y[:, :2].equal(x[:, :2]), y[:, 2:].equal(x[:, 2:])  # the first half of the channels passes
        (True, False)
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims = (),
        subnet_constructor: Subnet | None = None,
        clamp: float = 2.0,
        clamp_activation: str | Callable[[Tensor], Tensor] = "ATAN",
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, subnet_constructor, clamp, clamp_activation, split_len)
        self.f_clamp: Callable[[Tensor], Tensor] = importable(self.f_clamp)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """Map x to y, or y to x with ``rev``."""
        state = x[0]
        if not (for_kernels(state) and state.shape[1] == self.channels and self.split_len2 > 0):
            return super().forward(x, c, rev, jac)
        kept = state[:, : self.split_len1]
        cond = side_by_side(c) if self.conditional else None
        out, log_det = _affine(self, self.subnet, kept, state, self.split_len2, rev, cond)
        return (out,), log_det


class NICECouplingBlock(Fm.NICECouplingBlock):
    """y1 = x1 + F(x2, c), y2 = x2 + G(y1, c); log_det = 0.0, a float as in FrEIA.

    Arguments, parameters and errors are those of ``FrEIA.modules.NICECouplingBlock``; unlike it, it can be pickled.

    Shapes: x ((N, C, *spatial),), c of conditions (N, C_c, *spatial).

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import NICECouplingBlock
        >>> def subnet(channels_in, channels_out):
        ...     return torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        >>> block = NICECouplingBlock([(4, 8, 8)], subnet_constructor=subnet)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> (y,), log_det = block([x])
        >>> log_det, torch.allclose(block([y], rev=True)[0][0], x, atol=1e-5)
        (0.0, True)
    """

    def __init__(
        self,
        dims_in: Dims,
        dims_c: Dims = (),
        subnet_constructor: Subnet | None = None,
        split_len: float | int = 0.5,
    ) -> None:
        super().__init__(dims_in, dims_c, subnet_constructor, split_len)
        self.f_clamp: Callable[[Tensor], Tensor] = importable(self.f_clamp)

    def _coupling1(self, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, float]:
        shift = nets.run(self.F, u2)
        return (x1 - shift if rev else x1 + shift), 0.0

    def _coupling2(self, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, float]:
        shift = nets.run(self.G, u1)
        return (x2 - shift if rev else x2 + shift), 0.0
