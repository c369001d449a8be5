"""Layers that move values between space, channels and noise: squeeze, Haar's wavelet and split."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.layers.border import border_kernel, border_map
from pyglow_fast.layers.coupling_net import conv_for, zero_bias
from pyglow_fast.nets.precision import in_precision
from pyglow_fast.nets.run import condition_for


class Squeeze(FlowLayer):
    """Move space into channels: (N, C, *spatial) -> (N, C factor^d, *spatial / factor); log_det = 0.

    The order is that of pixel_unshuffle, out channel c*4 + 2*dh + dw for images, as in every Glow.

    Raises:
        ValueError: a spatial size does not divide by the factor (forward), or the channels by factor^d (inverse).

    Reference: Dinh et al. 2017, section 3.6.

    Examples:
        >>> import torch
        >>> from pyglow_fast import Squeeze
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> z, log_det = Squeeze()(image)
        >>> z.shape, log_det
        (torch.Size([1, 4, 2, 2]), tensor([0.]))
        >>> z[0, :, 0, 0]  # the upper left square of 2 x 2 pixels, now four channels
        tensor([0., 1., 4., 5.])
    """

    _shown = ("factor",)

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_count("factor", factor)
        self.factor = factor

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to z, each block of factor^d positions to channels of one position."""
        return functional.squeeze(x, self.factor), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, channels to blocks of positions."""
        return functional.unsqueeze(z, self.factor), z.new_zeros(z.shape[0])


class Haar(FlowLayer):
    """z = scale H x, of each block of 2^d positions: sums and differences; log_det = C P (log|det H| + 2^d log scale).

    (N, C, *spatial) becomes (N, C 2^d, *spatial / 2), P positions, band after band, C channels each: of images the
    averages, then the differences of columns, of rows and of both. A coupling that keeps the first C channels so keeps
    a small image.

    Args:
        scale: of sums and differences; None: 2^(-d/2), which keeps lengths, and the log_det is 0 (HiNet's). IRN has
            1/4, with which the first band of an image is its averages.
        sign: 1 for differences "left less right" and "upper less lower" (IRN), -1 for the opposite (HiNet).

    Shapes: x (N, C, *spatial), even sizes; z (N, C 2^d, *spatial / 2); log_det (N,), nats.

    Raises:
        ValueError: a scale of 0, another sign; an odd size (forward), or channels that do not divide by 2^d (inverse).

    References: Haar 1910; Ardizzone et al. 2019 (in a flow), Xiao et al. 2020 (IRN), Jing et al. 2021 (HiNet).

    Examples:
        >>> import torch
        >>> from pyglow_fast import Haar
        >>> image = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
        >>> z, log_det = Haar(scale=0.25)(image)
        >>> z.flatten(), log_det  # the average, then the differences; the logarithm of 1/16
        (tensor([ 4., -1., -2.,  0.]), tensor([-2.7726]))
        >>> torch.equal(Haar(scale=0.25).inverse(z)[0], image)
        True
    """

    _shown = ("scale", "sign")

    def __init__(self, scale: float | None = None, sign: int = 1) -> None:
        super().__init__()
        expect(scale is None or 0 < abs(scale) < math.inf, "scale", "None or a number other than 0", scale)
        expect(sign in (1, -1), "sign", "1 or -1", sign)
        self.scale, self.sign = scale, sign

    def _scale(self, dims: int) -> float:
        return 2.0 ** (-dims / 2) if self.scale is None else self.scale

    def _log_det(self, x: Tensor) -> Tensor:
        """log|det scale H| for each sample of x, or of z: as many numbers, each with the same share."""
        dims = x.dim() - 2
        each = dims / 2 * math.log(2.0) + math.log(abs(self._scale(dims)))
        return x.new_full((len(x),), each * math.prod(x.shape[1:]))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to z, each block of 2^d positions to channels of one position."""
        even = x.dim() > 2 and not any(size % 2 for size in x.shape[2:])
        expect(even, "x", "even spatial sizes", f"shape {tuple(x.shape)}")
        z = x
        for dim in range(x.dim() - 1, 1, -1):
            pair = z.unflatten(dim, (-1, 2)).unbind(dim + 1)
            z = torch.cat([pair[0] + pair[1], (pair[0] - pair[1]) * self.sign], dim=1)
        return z * self._scale(x.dim() - 2), self._log_det(x)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x, channels to blocks of positions."""
        dims = z.dim() - 2
        fits = dims > 0 and z.shape[1] % 2**dims == 0
        expect(fits, "z", "as many channels as 2^d divides", f"shape {tuple(z.shape)}")
        x = z * (0.5**dims / self._scale(dims))
        for dim in range(2, z.dim()):
            sums, differences = x.chunk(2, dim=1)
            x = torch.stack([sums + differences, sums - differences][:: self.sign], dim=dim + 1).flatten(dim, dim + 1)
        return x, -self._log_det(z)


def standardised(z: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """eps = (z - mean) / exp(log_sd), which undoes gaussian_sample."""
    return (z - mean) * (-log_sd).exp()


class Split(FlowLayer):
    """z1, z2 = parts of x; z = [z1, (z2 - mean) / exp(log_sd)], (mean, log_sd) = conv(z1); log_det = -sum log_sd.

    z2 has the prior N(z2; mean, exp(log_sd)), so what takes its place in z is standard normal noise, which leaves the
    flow: ``kept, noise = split.parts(z)``. A Glow's latents are the z2 themselves.

    The convolution (3x3, times exp(3 log_gain)) starts at zero, so a fresh prior is the standard normal and z is x.
    With ``learn_prior=False`` it stays that. With a condition, (mean, log_sd) = conv([z1, cond]).

    Args:
        channels: C of x, even where it is halved.
        learn_prior: whether z1 predicts mean and log_sd.
        dims: number of spatial dimensions, 1 to 3.
        border: the convolution also sees a ring of ones around the image, see CouplingNet.
        factored: C2, the channels of z2; None: half of them.
        cond_channels: of a condition that the convolution reads too; 0 for none.

    Shapes: x and z (N, C, *spatial); z1 (N, C - C2, *spatial), z2 (N, C2, *spatial); cond (N, C_cond, *spatial);
    log_det and log_prob (N,), nats.

    References: Kingma & Dhariwal 2018, section 3 and the released code's learned split prior; Lugmayr et al. 2020
    (condition).

    Examples:
        >>> import torch
        >>> from pyglow_fast import Split
        >>> split = Split(channels=4)
        >>> z, log_det = split(torch.randn(3, 4, 2, 2))
        >>> kept, noise = split.parts(z)  # further steps of a flow are of what is kept alone
        >>> mean, log_sd = split.prior(kept)  # of a fresh layer those of N(0, 1), whatever is kept
        >>> mean.shape, mean.count_nonzero().item(), log_sd.count_nonzero().item()
        (torch.Size([3, 2, 2, 2]), 0, 0)
        >>> sample, _ = split.inverse(torch.cat([kept, torch.zeros_like(noise)], dim=1))  # with the likeliest z2
        >>> split.parts(sample)[1].equal(mean)
        True
    """

    _shown = ("channels", "learn_prior")

    def __init__(
        self,
        channels: int,
        learn_prior: bool = True,
        dims: int = 2,
        border: bool = False,
        factored: int | None = None,
        cond_channels: int = 0,
    ) -> None:
        super().__init__()
        check_count("channels", channels, least=2)
        check_count("cond_channels", cond_channels, least=0)
        if factored is None:
            expect(channels % 2 == 0, "channels", "an even number to halve", channels)
            factored = channels // 2
        check_count("factored", factored)
        expect(factored < channels, "factored", f"less than the {channels} channels", factored)
        self.channels, self.learn_prior, self.dims = channels, learn_prior, dims
        self.factored, self.kept, self.cond_channels = factored, channels - factored, cond_channels
        if learn_prior:
            self.conv = conv_for(dims)(self.kept + cond_channels, 2 * factored, 3, padding=1)
            nn.init.zeros_(self.conv.weight)
            zero_bias(self.conv)
            self.log_gain = nn.Parameter(torch.zeros(2 * factored, *[1] * dims))
        self.border = border_kernel(2 * factored, dims) if border and learn_prior else None

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Divide x, or z, into the channels that are kept and those that are factored out."""
        return x[:, : self.kept], x[:, self.kept :]

    def prior(self, kept: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict mean and log_sd of z2 from z1 (and the condition), each like z2."""
        if not self.learn_prior:
            zeros = kept.new_zeros(kept.shape[0], self.factored, *kept.shape[2:])
            return zeros, zeros
        check_input("kept", kept, self.kept, self.conv.weight)
        # A convolution would take (N, C, L) for one image without a batch dimension.
        expect(kept.dim() == self.dims + 2, "kept", f"{self.dims} spatial dimensions", f"shape {tuple(kept.shape)}")
        if self.cond_channels:
            kept = torch.cat([kept, condition_for(kept, cond)], dim=1)
        with in_precision("auto", kept):  # as all nets are told to run, so that latents go back by the prior they had
            out = self.conv(kept)
        if self.border is not None:
            out = out + border_map(self.border, kept.shape[2:])
        mean, log_sd = (out * (3.0 * self.log_gain).exp()).to(kept.dtype).chunk(2, dim=1)
        return mean, log_sd

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to z: what is kept, and what is factored out as standard normal noise."""
        check_input("x", x, self.channels)
        kept, factored = self.parts(x)
        mean, log_sd = self.prior(kept, cond)
        return torch.cat([kept, standardised(factored, mean, log_sd)], dim=1), -log_sd.flatten(1).sum(1)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x: z2 = mean + exp(log_sd) noise; with fresh noise it is a sample of z2."""
        check_input("z", z, self.channels)
        kept, noise = self.parts(z)
        mean, log_sd = self.prior(kept, cond)
        return torch.cat([kept, functional.gaussian_sample(noise, mean, log_sd)], dim=1), log_sd.flatten(1).sum(1)

    def log_prob(self, kept: Tensor, factored: Tensor, cond: Tensor | None = None) -> Tensor:
        """log N(z2; prior(z1)), the log density of what leaves the flow, summed per sample, (N,) nats."""
        return functional.gaussian_log_prob(factored, *self.prior(kept, cond))
