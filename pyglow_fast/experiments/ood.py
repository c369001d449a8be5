"""Measures how well a likelihood tells foreign images from those a model knows: AUROC, and a histogram of both."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments
from pyglow_fast.data import optional

BINS = 60  # at most; fewer for fewer images
TAIL = 0.001  # share of each set that may lie beyond either end of the axis


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


def histogram_png(
    sets: Mapping[str, Tensor],
    title: str,
    marks: Mapping[str, float] | None = None,
    text: Mapping[str, str] | None = None,
) -> bytes:
    """Draw sets of finite bits/dim, by their names, as one histogram on common bins, each as shares of 100 %; a PNG.

    At most TAIL of each lies beyond either end of the axis, whose label says how many do. ``marks`` are bits/dim of
    single images by their short names, all on the axis but for those that are not finite; ``text`` is kept in the PNG.
    """
    figure_class = optional("matplotlib.figure", "the histogram").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(8, 4.5), layout="constrained")).subplots()
    marked = sorted((value, name) for name, value in (marks or {}).items() if math.isfinite(value))
    values = {name: found.double().numpy() for name, found in sets.items()}
    ends = [np.quantile(found, [TAIL, 1.0 - TAIL]) for found in values.values()] + [[value] for value, _ in marked]
    low, high = min(map(min, ends)), max(map(max, ends))
    margin = 0.02 * (high - low) or 0.5
    count = min(BINS, max(10, 2 * math.isqrt(min(map(len, values.values())))))
    bins = np.linspace(low - margin, high + margin, 1 + count)
    beyond = sum(int(((found < bins[0]) | (found > bins[-1])).sum()) for found in values.values())
    for i, (name, found) in enumerate(values.items()):
        share, label = np.full(len(found), 100.0 / len(found)), f"{name}: {len(found)} images, mean {found.mean():.3f}"
        axes.hist(found, bins, weights=share, alpha=0.55, color=f"C{i}", label=label)
        axes.axvline(found.mean(), color=f"C{i}", ls="--", lw=1.2)
    top = axes.get_ylim()[1]
    if marked:
        axes.set_ylim(0.0, 1.2 * top)  # room for the legend, above the lines
    box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}  # other lines go below it
    for i, (value, name) in enumerate(marked):
        axes.axvline(value, ymax=0.9, color="C3", lw=1.2)
        side = "left" if value < bins.mean() else "right"  # where there is more room, neighbours at other heights
        place = (value, top * (1.04 - 0.06 * (i % 12)))
        axes.text(*place, f" {name} ", ha=side, va="top", fontsize=8, color="C3", parse_math=False, bbox=box)
    axes.set_title(title, parse_math=False)
    total = sum(map(len, values.values()))
    unseen = f"; {beyond} of {total} images {'lie' if beyond > 1 else 'lies'} beyond this axis" if beyond else ""
    axes.set(xlabel=f"bits/dim (less is more likely{unseen})", ylabel="share of the set's images, %")
    axes.grid(alpha=0.3)
    for label in axes.legend().get_texts():
        label.set_parse_math(False)  # the names of images may hold a $
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120, metadata=dict(text or {}))
    return buffer.getvalue()
