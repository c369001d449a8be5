"""The 1x1 convolution of Glow-TTS: one small matrix for all groups of channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.errors import check_count, expect
from pyglow_fast.layers.permutation import ChannelLinear


def spread_over_groups(weight: Tensor, channels: int) -> Tensor:
    """Make W (C, C) that multiplies every group of channels by weight (size, size): size / 2 neighbours of each half.

    Group j has the channels j size / 2 .. (j + 1) size / 2 - 1, and the same ones counted from C / 2.
    """
    count, half = channels // weight.shape[0], weight.shape[0] // 2
    same = torch.eye(count, dtype=weight.dtype, device=weight.device)
    whole = weight.reshape(2, 1, half, 2, 1, half) * same.reshape(1, count, 1, 1, count, 1)
    return whole.reshape(channels, channels)


class GroupedInvConv(ChannelLinear):
    """Invertible 1x1 convolution in groups: z_g = w x_g for every group g; log_det = P (C / size) log|det w|.

    All groups share w (size, size), which starts as a random rotation. A group has size / 2 channels of each half, so
    that the coupling that follows, which keeps the first half, sees channels of both.

    Args:
        channels: C.
        size: of a group (n_split), even, a divisor of C.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: a size that is odd or no divisor; wrong shape, dtype or device; inverse of a singular w.

    Reference: Kim et al. 2020, appendix A.1.

    Examples:
        >>> from pyglow_fast import GroupedInvConv
        >>> weight, _ = GroupedInvConv(channels=8, size=4).weight_and_log_det()
        >>> weight.shape, weight.count_nonzero().item()  # two groups of four channels: 4 x 4 numbers for each
        (torch.Size([8, 8]), 32)
    """

    _shown = ("channels", "size")

    def __init__(self, channels: int, size: int = 4) -> None:
        super().__init__()
        check_count("channels", channels)
        check_count("size", size, least=2)
        expect(size % 2 == 0 and channels % size == 0, "size", f"an even divisor of {channels} channels", size)
        self.channels, self.size = channels, size
        rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
        self.weight = nn.Parameter(rotation.to(torch.get_default_dtype()))

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """The matrix W (C, C), with w for each group, and log|det W| ()."""
        log_det = functional.log_abs_det(self.weight) * (self.channels // self.size)
        return spread_over_groups(self.weight, self.channels), log_det
