"""The class head: a linear classifier of the top latent, and its loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyglow_fast.reference import full_product


class ClassHead(nn.Module):
    """logits = exp(3 log_gain) (W h + b), h the mean of the top latent over its positions.

    All parameters start at zero, so a fresh head finds every class equally likely.

    Args:
        channels: C of the top latent.
        n_classes: number of classes.

    Shapes: z (N, C, *spatial), float32 or float64, to logits (N, n_classes) of its dtype.

    Reference: Kingma & Dhariwal 2018, released code (model.py, "classifier"; tfops.py, linear_zeros).
    """

    def __init__(self, channels: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_classes, channels))
        self.bias = nn.Parameter(torch.zeros(n_classes))
        self.log_gain = nn.Parameter(torch.zeros(n_classes))

    def forward(self, z: Tensor) -> Tensor:
        """Predict logits (N, n_classes) from the top latent z (N, C, *spatial)."""
        with torch.autocast(z.device.type, enabled=False):  # the flow state, and what is read off it, stay float32
            pooled = z.flatten(2).mean(2)
            return (full_product(pooled, self.weight.mT) + self.bias) * (3.0 * self.log_gain).exp()


def class_bits(logits: Tensor, labels: Tensor) -> Tensor:
    """-log2 softmax(logits)[label], (N,): bits per image that the labels cost, to add to bits/dim with a weight.

    Args:
        logits: (N, n_classes).
        labels: int64 (N,), in 0..n_classes-1.
    """
    return F.cross_entropy(logits, labels, reduction="none") / math.log(2.0)
