"""What every layer of a flow promises."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlowLayer(nn.Module):
    """Base of the invertible layers.

    ``forward(x, cond=None) -> (z, log_det)`` maps data to latent, ``inverse(z, cond=None) -> (x, log_det)`` back, with
    log_det of shape (N,), the log of |det dz/dx| per sample (the inverse returns its negative).
    """

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Set data-dependent parameters from x and return z; layers without any just map. No gradient is recorded."""
        with torch.no_grad():
            z, _ = self(x, cond)
        return z
