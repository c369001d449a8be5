"""AUROC with its standard error against what it is defined by, and histograms."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from sklearn.metrics import roc_auc_score

from pyglow_fast.experiments import auroc, histogram_png


@pytest.mark.parametrize(("shift", "ties"), [(0.0, False), (1.0, False), (-1.5, False), (0.5, True)])
def test_auroc_is_the_share_of_pairs(shift: float, ties: bool) -> None:
    """And its variance that of DeLong, by the table of all pairs."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(40, generator=generator, dtype=torch.float64)
    foreign = torch.randn(70, generator=generator, dtype=torch.float64) + shift
    if ties:
        own, foreign = (own * 2).round(), (foreign * 2).round()
    found = auroc(own, foreign)
    wins = (foreign[:, None] > own).double() + (foreign[:, None] == own).double() / 2
    variance = wins.mean(1).var() / len(foreign) + wins.mean(0).var() / len(own)
    assert found.value == pytest.approx(float(wins.mean()), abs=1e-12)  # sums of 2,800 terms in float64
    assert found.value == pytest.approx(roc_auc_score([0] * 40 + [1] * 70, torch.cat([own, foreign])), abs=1e-12)
    assert found.standard_error == pytest.approx(float(variance.sqrt()), abs=1e-12)


@pytest.mark.drawn
def test_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets fill the same bins with 100 %, and an image far away neither stretches the axis nor is hushed up."""
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    labels: list[str] = []
    hist, set_all = Axes.hist, Axes.set

    def spy(self: Axes, *args: object, **options: object) -> object:
        heights, edges, patches = hist(self, *args, **options)
        drawn.append((heights, edges))
        return heights, edges, patches

    def spy_set(self: Axes, **options: str) -> object:
        labels.append(options["xlabel"])
        return set_all(self, **options)

    monkeypatch.setattr(Axes, "hist", spy)
    monkeypatch.setattr(Axes, "set", spy_set)
    generator = torch.Generator().manual_seed(5)
    own, foreign = torch.randn(3000, generator=generator), torch.randn(2000, generator=generator) + 4
    own[0] = 1e6
    with Image.open(io.BytesIO(histogram_png({"a_$1": own, "b$": foreign}, "t$"))) as picture:
        assert picture.size == (960, 540)
    (first, edges), (second, others) = drawn
    assert np.array_equal(edges, others)
    assert edges[-1] < 20
    seen = [((values >= edges[0]) & (values <= edges[-1])).double().mean() * 100 for values in (own, foreign)]
    assert [first.sum(), second.sum()] == pytest.approx([float(share) for share in seen])
    assert min(seen) > 99.5
    beyond = sum(int(((values < edges[0]) | (values > edges[-1])).sum()) for values in (own, foreign))
    assert labels == [f"bits/dim (less is more likely; {beyond} of 5000 images lie beyond this axis)"]
    histogram_png({"a": torch.ones(3), "b": torch.ones(4)}, "equal scores")
