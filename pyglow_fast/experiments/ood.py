"""Measures how well a likelihood tells foreign images from those a model knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments


@dataclass(frozen=True)
class Auroc:
    """P(s' > s) + P(s' = s) / 2 for a foreign image's score s' and an own image's s, with its standard error.

    ``standard_error`` is NaN where the sets are wholly apart: there DeLong's estimate has nothing to go by.

    Examples:
        >>> import torch
        >>> from pyglow_fast.experiments import auroc
        >>> found = auroc(own=torch.tensor([3.0, 3.1, 3.3]), foreign=torch.tensor([3.2, 3.4, 3.5]))
        >>> f"{found.value:.3f}", found.below_chance  # eight of nine pairs are in order
        ('0.889', False)
    """

    value: float
    standard_error: float

    @property
    def below_chance(self) -> bool:
        """Whether foreign images have lower scores, by more than two standard errors."""
        return self.value + (0.0 if math.isnan(self.standard_error) else 2.0 * self.standard_error) < 0.5

    @property
    def text(self) -> str:
        """The value and its standard error as text for people."""
        error = "n/a" if math.isnan(self.standard_error) else f"{self.standard_error:.4f}"
        return f"{self.value:.4f} ± {error}"


def auroc(own: Tensor, foreign: Tensor) -> Auroc:
    """Compute AUROC = mean over pairs of 1[s' > s] + 1[s' = s] / 2, with DeLong's standard error.

    With V_j the share of own scores below foreign score j (ties count half) and W_i the share of foreign scores above
    own score i, the AUROC is their mean and its variance var(V) / m + var(W) / n. 0.5 is chance; below it foreign
    images score *lower*. Each side needs two scores at least, all finite.

    Reference: DeLong, DeLong & Clarke-Pearson 1988.
    """
    for name, values in (("own", own), ("foreign", foreign)):
        expect(values.dim() == 1 and len(values) >= 2, name, "at least 2 scores", tuple(values.shape))
        expect(bool(values.isfinite().all()), name, "finite scores", "NaN or inf")
    shares = _below(foreign, own), 1.0 - _below(own, foreign)
    error = math.hypot(*(Moments.of(share).standard_error for share in shares))
    return Auroc(float(shares[0].mean()), error if error > 0.0 else math.nan)


def _below(scores: Tensor, others: Tensor) -> Tensor:
    """The share of ``others`` below each of ``scores``, float64, ties counting half."""
    ordered, scores = others.double().sort().values, scores.double()
    counts = torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)
    return counts.double() / (2.0 * len(others))


def typicality(bits_per_dim: Tensor, typical: float) -> Tensor:
    """Compute |b - b_typical|, the distance from the mean of training images (Nalisnick et al. 2019, for one image)."""
    return (bits_per_dim - typical).abs()
