"""The border term: what a ring of ones around the image adds to a convolution that pads with zeros.

The ring (1 outside of the image, 0 inside) has a 3x3 kernel of its own per output channel, so the term is a map of the
position alone, zero but at the rim. An input channel that marks the edge (the released Glow) and padding with ones are
both of this form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast._core import float32
from pyglow_fast.reference import full_precision


def border_kernel(out_channels: int, dims: int) -> nn.Parameter:
    """Make the ring's kernel (out_channels, 1, 3, ...), all zeros: no border term yet."""
    return nn.Parameter(torch.zeros(out_channels, 1, *[3] * dims))


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply the output channels (dimension 0) of a weight."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


def border_map(kernel: Tensor, spatial: Sequence[int]) -> Tensor:
    """Compute the border term ring * kernel, (1, C_out, *spatial), of a kernel (C_out, 1, 3, ...)."""
    wide = kernel.double() if float32.rounds(float32.CONVOLUTIONS, kernel) else kernel
    ring = F.pad(wide.new_zeros(1, 1, *spatial), [1, 1] * len(spatial), value=1.0)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(spatial)]
    with full_precision(kernel):
        return conv(ring, wide).to(kernel.dtype)


def without_border(weights: Sequence[Tensor], scale: Tensor | None, border1: Tensor, border3: Tensor) -> list[Tensor]:
    """Fold a net's border term into its weights; the net then needs one more input channel, of ones.

    ring * k = sum k - ones * k, where the ones inside of the image are padded with zeros: an input channel for the
    first convolution, and for the last one a hidden unit that is relu(0 h + 1). So nets with a border term run and are
    cut into chunks as all others.

    Args:
        weights: w1, b1, w2, b2, w3, b3, log_gain.
        scale: of the ActNorm after the first convolution, already part of w1; (hidden,) or None.
        border1, border3: kernels of the ring, (hidden, 1, 3, ...) and (C_out, 1, 3, ...).
    """
    w1, b1, w2, b2, w3, b3, log_gain = weights
    border1 = border1 if scale is None else scaled(border1, scale)
    w1, b1 = torch.cat([w1, -border1], dim=1), b1 + border1.flatten(1).sum(1)
    w2, b2 = torch.cat([w2, torch.zeros_like(w2[:1])]), torch.cat([b2, torch.ones_like(b2[:1])])
    w3, b3 = torch.cat([w3, -border3], dim=1), b3 + border3.flatten(1).sum(1)
    return [w1, b1, w2, b2, w3, b3, log_gain]
