"""The injector: a condition alone decides how all channels are shifted and scaled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pyglow_fast._core.errors import check_count, check_input
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.runs.description import NetCoupling, Run

_SIGMOID = CouplingSpec()


class AffineInjector(Coupling):
    """z = (x + shift) s at every position, (shift, raw) = net(cond), s = scale_map(raw); log_det = sum log s.

    A coupling that keeps no channel: its net reads the condition and nothing of x. In order "scale_shift" it is
    z = x s + shift.

    Args:
        channels: C.
        cond_channels: channels of the condition, which a CouplingNet made here reads.
        hidden: width of that net.
        net: a net of your own instead: (N, C_cond, *spatial) to (N, 2 C, *spatial), shift, then raw.
        net_actnorm: ActNorm inside the net, initialised from the condition of the first training forward.
        dims: number of spatial dimensions, 1 to 3.
        border: of the net, see CouplingNet.
        spec: the scale map and the order; its coupling is "affine" in any case.
        precision: of the net, see Coupling.

    Shapes: x (N, C, *spatial), float32 or float64; cond (N, C_cond, *spatial), of the same positions; log_det (N,),
    nats.

    Raises:
        ValueError: a wrong option; no condition, or one of another batch or other spatial sizes than x; a net whose
            output has the wrong shape.

    Reference: Lugmayr et al. 2020 (SRFlow), section 3.3.

    Examples:
        >>> import torch
        >>> from pyglow_fast import AffineInjector
        >>> layer = AffineInjector(channels=4, cond_channels=3, hidden=8)
        >>> x, cond = torch.randn(2, 4, 6, 6), torch.randn(2, 3, 6, 6)
        >>> z, log_det = layer(x, cond)
        >>> torch.allclose(layer.inverse(z, cond)[0], x, atol=1e-5)
        True
        >>> torch.equal(layer(x + 1, cond)[1], log_det)  # the scales are those of the condition, whatever x is
        True
    """

    def __init__(
        self,
        channels: int,
        cond_channels: int = 0,
        hidden: int = 64,
        net: nn.Module | None = None,
        net_actnorm: bool = False,
        dims: int = 2,
        *,
        spec: CouplingSpec = _SIGMOID,
        precision: str = "auto",
        border: bool = False,
    ) -> None:
        check_count("channels", channels)
        if net is None:
            check_count("cond_channels", cond_channels)
            net = CouplingNet(cond_channels, 2 * channels, hidden, net_actnorm, border=border, dims=dims)
        super().__init__(net, *spec._replace(coupling="affine"), precision)
        self.channels = channels

    def element(self, channels: int) -> NetCoupling:
        """The injector as a run has it: a coupling that keeps no channel."""
        net: Any = self._modules["net"]  # and not by attribute, which costs a multiple
        return NetCoupling(net, self.spec, 0, channels, self._precision)

    def _alone(self, x: Tensor) -> Run:
        check_input("x", x, self.channels)
        return Run.of([self.element(self.channels)])

    def extra_repr(self) -> str:
        """Show channels and scale map in the repr."""
        return f"{self.channels}, scale_map={self.spec.scale_map!r}, order={self.spec.order!r}"
