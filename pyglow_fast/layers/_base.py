"""The base class of the layers of a flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlowLayer(nn.Module):
    """The base class of invertible layers: a bijection and the log of its volume change.

    ``forward(x, cond=None) -> (z, log_det)`` maps data to latent, ``inverse(z, cond=None) -> (x, log_det)`` back, with
    log_det of shape (N,), the log of |det dz/dx| per sample (the inverse returns its negative).

    Examples:
        >>> import torch
        >>> from pyglow_fast import ReversibleSequence
        >>> from pyglow_fast.layers import FlowLayer
        >>> class Mirror(FlowLayer):
        ...     def forward(self, x, cond=None):
        ...         return x.flip(-1), x.new_zeros(len(x))
        ...     def inverse(self, z, cond=None):
        ...         return z.flip(-1), z.new_zeros(len(z))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(ReversibleSequence([Mirror(), Mirror()])(x)[0], x)  # mirrored twice
        True
    """

    _shown: tuple[str, ...] = ()  # attributes that the repr shows

    def extra_repr(self) -> str:
        """Show the layer's options in the repr."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Set data-dependent parameters from x and return z; layers without any just map. No gradient is recorded."""
        with torch.no_grad():
            z: Tensor = self(x, cond)[0]
        return z
