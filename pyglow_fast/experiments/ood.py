"""Measures how well a likelihood tells foreign images from those a model knows: AUROC, and a histogram of both."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast._moments import Moments
from pyglow_fast.data import optional
from pyglow_fast.train.files import replacing

BINS = 60  # at most; fewer for fewer images
TAIL = 0.001  # share of each set that may lie beyond either end of the axis


@dataclass(frozen=True)
class Auroc:
    """P(s' > s) + P(s' = s) / 2 for a foreign image's score s' and an own image's s, with its standard error.

    ``standard_error`` is NaN where the sets are wholly apart: there DeLong's estimate has nothing to go by.

    Examples:
        >>> import torch
        >>> from pyglow_fast.experiments import Auroc, auroc
        >>> found = auroc(own=torch.tensor([3.0, 3.1, 3.3]), foreign=torch.tensor([3.2, 3.4, 3.5]))
        >>> isinstance(found, Auroc), f"{found.value:.3f}", found.below_chance  # eight of nine pairs are in order
        (True, '0.889', False)
        >>> Auroc(0.31, 0.02).below_chance  # foreign images are likelier than the model's own kind
        True
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
    own score i, the variance is var(V) / m + var(W) / n. 0.5 is chance; below it foreign images score *lower*.

    Args:
        own: (n,) floating, scores of images like those of the training, n >= 2.
        foreign: (m,) floating, scores of other images, m >= 2.

    Raises:
        ValueError: fewer than two scores, or one that is not finite.
        MissingExtraError: scikit-learn is not installed.

    Reference: DeLong, DeLong & Clarke-Pearson 1988.
    """
    for name, values in (("own", own), ("foreign", foreign)):
        expect(values.dim() == 1 and len(values) >= 2, name, "at least 2 scores", tuple(values.shape))
        expect(bool(values.isfinite().all()), name, "finite scores", "NaN or inf")
    a, b = own.double().numpy(), foreign.double().numpy()
    truth = np.repeat([0, 1], [len(a), len(b)])
    value = float(optional("sklearn.metrics", "the AUROC").roc_auc_score(truth, np.concatenate([a, b])))
    shares = _placements(b, a), 1.0 - _placements(a, b)
    error = math.hypot(*(Moments.of(torch.from_numpy(share)).standard_error for share in shares))
    return Auroc(value, error if error > 0.0 else math.nan)


def _placements(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of ``others`` below each of ``scores``, ties counting half."""
    ordered = np.sort(others)
    below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return (below + up_to) / (2.0 * len(others))


def typicality(bits_per_dim: Tensor, typical: float) -> Tensor:
    """Compute |b - b_typical|: how far bits/dim are from those typical of training images, in either direction.

    Args:
        bits_per_dim: b, any shape.
        typical: the mean bits/dim of training images.

    Reference: Nalisnick et al. 2019, "Detecting out-of-distribution inputs to deep generative models using typicality"
    (their test for a single image).
    """
    return (bits_per_dim - typical).abs()


def save_histogram(path: Path, own: Tensor, foreign: Tensor, names: tuple[str, str], title: str) -> None:
    """Draw both sets of bits/dim as one histogram on common bins, each as the share of its images in a bin; a PNG.

    Args:
        path: the picture, replaced atomically.
        own, foreign: (n,) and (m,), finite, bits/dim. At most TAIL of each set lies beyond either end of the axis;
            the label of the axis says how many images do.
        names: the names of the two sets, for the legend.
        title: of the picture.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    sets = [own.double(), foreign.double()]
    count = min(BINS, max(10, 2 * math.isqrt(min(map(len, sets)))))
    figure, _ = _histogram(dict(zip(names, sets, strict=True)), _bins(sets, count), title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def marked_histogram(own: Tensor, name: str, marks: Mapping[str, float], title: str, text: Mapping[str, str]) -> bytes:
    """Draw a histogram of bits/dim with a line for each single image, as a PNG.

    Args:
        own: (n,), finite, bits/dim of images to compare with.
        name: what the legend calls them.
        marks: bits/dim of single images by their short names, which stand beside the lines; all are on the axis, those
            that are not finite are left out.
        title: of the picture.
        text: texts that are kept in the PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    shown = {label: value for label, value in marks.items() if math.isfinite(value)}
    points = torch.tensor(list(shown.values()), dtype=torch.float64)
    count = min(BINS, max(10, 2 * math.isqrt(len(own))))
    bins = _bins([own.double(), *points.unsqueeze(1)], count)  # a set of one lies on the axis as a whole
    figure, axes = _histogram({name: own.double()}, bins, title)
    top = axes.get_ylim()[1]
    axes.set_ylim(0.0, 1.2 * top)  # room for the legend, above the lines
    for i, (label, value) in enumerate(sorted(shown.items(), key=lambda item: item[1])):
        axes.axvline(value, ymax=0.9, color="C3", lw=1.2)
        height = top * (1.04 - 0.06 * (i % 12))  # neighbours at other heights
        right = value < bins.mean()  # on the side where there is more room
        style = {"ha": "left" if right else "right", "va": "top", "fontsize": 8, "parse_math": False}
        ground = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}  # other lines go below it
        axes.text(value, height, f" {label}" if right else f"{label} ", color="C3", bbox=ground, **style)
    figure.savefig(buffer := io.BytesIO(), format="png", dpi=120, metadata=dict(text))
    return buffer.getvalue()


def _bins(sets: Sequence[Tensor], count: int) -> np.ndarray:
    """``count`` bins on which at most TAIL of each set lies beyond either end."""
    edges = torch.tensor([TAIL, 1.0 - TAIL], dtype=torch.float64)
    ends = torch.stack([values.quantile(edges) for values in sets])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    margin = 0.02 * (high - low) or 0.5
    return np.linspace(low - margin, high + margin, count + 1)


def _histogram(sets: Mapping[str, Tensor], bins: np.ndarray, title: str) -> tuple[Any, Any]:
    """(figure, axes): each set as the share of its images in a bin, with its mean."""
    figure_class = optional("matplotlib.figure", "the histogram").Figure  # no pyplot: no global state
    axes = (figure := figure_class(figsize=(8, 4.5), layout="constrained")).subplots()
    beyond = 0
    for i, (name, values) in enumerate(sets.items()):
        beyond += int(((values < bins[0]) | (values > bins[-1])).sum())
        share = np.full(len(values), 100.0 / len(values))
        label = f"{name}: {len(values)} images, mean {float(values.mean()):.3f}"
        axes.hist(values.numpy(), bins, weights=share, alpha=0.55, color=f"C{i}", label=label)
        axes.axvline(float(values.mean()), color=f"C{i}", ls="--", lw=1.2)
    axes.set_title(title, parse_math=False)
    total = sum(map(len, sets.values()))
    unseen = f"; {beyond} of {total} images {'lie' if beyond > 1 else 'lies'} beyond this axis" if beyond else ""
    axes.set(xlabel=f"bits/dim (less is more likely{unseen})", ylabel="share of the set's images, %")
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)  # the names of images may hold a $
    return figure, axes
