"""What every layer of a flow promises, and the checks they share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a size that is not an int of at least ``least``."""
    expect(isinstance(value, int) and value >= least, name, f"an int, at least {least}", repr(value))


def check_input(name: str, x: Tensor, channels: int, like: Tensor | None = None) -> None:
    """Refuse x unless it is (N, channels, *spatial), float32 or float64, on the device and of the dtype of ``like``."""
    expect(isinstance(x, Tensor), name, "a Tensor", type(x).__name__)
    expect(x.dim() >= 2, name, "shape (N, C, *spatial)", f"shape {tuple(x.shape)}")
    expect(x.shape[1] == channels, name, f"{channels} channels (dimension 1)", f"shape {tuple(x.shape)}")
    if like is not None:
        kept = like.dtype in (torch.float32, torch.float64)
        expect(kept, "parameters", "dtype float32 or float64: the flow needs their precision", like.dtype)
    expect(x.dtype in (torch.float32, torch.float64), name, "dtype float32 or float64", x.dtype)
    if like is not None:
        expect(x.device == like.device, name, f"device {like.device} (where the parameters are)", x.device)
        expect(x.dtype == like.dtype, name, f"dtype {like.dtype} (that of the parameters)", x.dtype)


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
