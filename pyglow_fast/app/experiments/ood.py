"""Measures how well a likelihood tells foreign images from those a model knows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.moments import Moments


def auroc(own: Tensor, foreign: Tensor) -> tuple[float, float]:
    """Compute AUROC = mean over pairs of 1[s' > s] + 1[s' = s] / 2, and DeLong's standard error of it.

    With V_j the share of own scores below foreign score j (ties count half) and W_i the share of foreign scores above
    own score i, the AUROC is their mean and its variance var(V) / m + var(W) / n. 0.5 is chance; below it foreign
    images score *lower*. The error is NaN where the sets are wholly apart: the estimate has nothing to go by there.
    Each side needs two scores at least, all finite.

    Reference: DeLong, DeLong & Clarke-Pearson 1988.

    Examples:
        >>> import torch
        >>> from pyglow_fast.app.experiments.ood import auroc
        >>> value, error = auroc(own=torch.tensor([3.0, 3.1, 3.3]), foreign=torch.tensor([3.2, 3.4, 3.5]))
        >>> f"{value:.3f}"  # eight of nine pairs are in order
        '0.889'
    """
    for name, values in (("own", own), ("foreign", foreign)):
        expect(values.dim() == 1 and len(values) >= 2, name, "at least 2 scores", tuple(values.shape))
        expect(bool(values.isfinite().all()), name, "finite scores", "NaN or inf")
    shares = _below(foreign, own), 1.0 - _below(own, foreign)
    error = math.hypot(*(Moments.of(share).standard_error for share in shares))
    return float(shares[0].mean()), error if error > 0.0 else math.nan


def _below(scores: Tensor, others: Tensor) -> Tensor:
    """The share of ``others`` below each of ``scores``, float64, ties counting half."""
    ordered, scores = others.double().sort().values, scores.double()
    counts = torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)
    return counts.double() / (2.0 * len(others))


def typicality(bits_per_dim: Tensor, typical: float) -> Tensor:
    """Compute |b - b_typical|, the distance from the mean of training images (Nalisnick et al. 2019, for one image)."""
    return (bits_per_dim - typical).abs()
