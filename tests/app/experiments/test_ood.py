"""AUROC with its standard error against what it is defined by."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from pyglow_fast.app.experiments.ood import auroc


@pytest.mark.parametrize(("shift", "ties"), [(0.0, False), (1.0, False), (-1.5, False), (0.5, True)])
def test_auroc_is_the_share_of_pairs(shift: float, ties: bool) -> None:
    """And its variance that of DeLong, by the table of all pairs."""
    generator = torch.Generator().manual_seed(3)
    own = torch.randn(40, generator=generator, dtype=torch.float64)
    foreign = torch.randn(70, generator=generator, dtype=torch.float64) + shift
    if ties:
        own, foreign = (own * 2).round(), (foreign * 2).round()
    value, error = auroc(own, foreign)
    wins = (foreign[:, None] > own).double() + (foreign[:, None] == own).double() / 2
    variance = wins.mean(1).var() / len(foreign) + wins.mean(0).var() / len(own)
    assert value == pytest.approx(float(wins.mean()), abs=1e-12)  # sums of 2,800 terms in float64
    assert value == pytest.approx(roc_auc_score([0] * 40 + [1] * 70, torch.cat([own, foreign])), abs=1e-12)
    assert error == pytest.approx(float(variance.sqrt()), abs=1e-12)
