"""The prior of the top latent, and checked noise for sampling."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor, nn

from pyglow_fast._core.errors import can_read, expect
from pyglow_fast.layers.border import border_kernel, border_map


class TopPrior(nn.Module):
    """N(z; mean, exp(log_sd)) with one mean and log_sd per channel, plus an offset per class and a border term.

    All parameters start at zero, so a fresh prior is the standard normal.

    Args:
        channels: C of the top latent.
        n_classes: number of classes, or None.
        learn: whether there are parameters per channel; class offsets are always learned.
        border: whether positions at the rim differ, as where a convolution of zeros sees a ring of ones around them;
            only with learn.
        dims: number of spatial dimensions, 1 to 3.

    Reference: Kingma & Dhariwal 2018, released code (learn_top, y_emb).
    """

    def __init__(
        self, channels: int, n_classes: int | None = None, learn: bool = True, border: bool = False, dims: int = 2
    ) -> None:
        super().__init__()
        self.channels, self.n_classes = channels, n_classes
        self.mean_log_sd = nn.Parameter(torch.zeros(2 * channels)) if learn else None
        self.class_offset = None if n_classes is None else nn.Parameter(torch.zeros(n_classes, 2 * channels))
        self.border = border_kernel(2 * channels, dims) if border and learn else None

    def forward(self, like: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Give mean and log_sd of the prior, each broadcastable to ``like`` (N, C, *spatial)."""
        values = like.new_zeros(1, 2 * self.channels) if self.mean_log_sd is None else self.mean_log_sd.unsqueeze(0)
        if self.class_offset is not None:
            assert y is not None  # checked by check_labels before
            values = values + self.class_offset[y]
        values = values.reshape(*values.shape, *[1] * (like.dim() - 2))
        if self.border is not None:
            values = values + border_map(self.border, like.shape[2:])
        mean, log_sd = values.chunk(2, dim=1)
        return mean, log_sd


def check_labels(y: Tensor | None, n: int, n_classes: int | None) -> None:
    """Refuse labels that are missing, not wanted, of the wrong shape or dtype, or (on the CPU only) out of range."""
    if n_classes is None:
        expect(y is None, "y", "None, since the model has no classes (n_classes=None)", type(y).__name__)
        return
    expect(isinstance(y, Tensor), "y", f"labels in 0..{n_classes - 1} (n_classes={n_classes})", type(y).__name__)
    assert y is not None  # for the type checker: refused above
    fits = y.dtype == torch.int64 and tuple(y.shape) == (n,)
    expect(fits, "y", f"int64 of shape ({n},)", f"{y.dtype} {tuple(y.shape)}")
    if can_read(y) and n:
        low, high = (int(value) for value in torch.aminmax(y))
        expect(low >= 0 and high < n_classes, "y", f"labels in 0..{n_classes - 1}", f"{low}..{high}")


def check_temperature(temperature: float | Tensor, n: int) -> None:
    """Refuse a temperature that is negative, not finite, or a tensor not of shape (n,)."""
    expected = f"a number or shape ({n},)"
    if isinstance(temperature, Tensor):
        shape = tuple(temperature.shape)
        expect(shape in ((), (n,)), "temperature", expected, shape)
        if not can_read(temperature):
            return
        valid = bool((temperature.isfinite() & (temperature >= 0)).all())
    else:
        expect(isinstance(temperature, Real), "temperature", expected, repr(temperature))
        valid = 0.0 <= temperature < float("inf")
    expect(valid, "temperature", "finite values, 0 or more", temperature)


def scaled_noise(like: Tensor, temperature: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """temperature * eps, eps ~ N(0, 1) of the shape, dtype and device of ``like``; temperature a number or (N,)."""
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(like).reshape(-1, *[1] * (like.dim() - 1))
    return noise * temperature
