"""Samples by their description: one stream of random numbers, and classes in turn, however many there are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pyglow_fast.studio.samples import BATCH, Draw

from pyglow_fast.studio.opened import OpenRun
from pyglow_fast.train import to_pixels


@pytest.mark.parametrize("labels", [(), (3, 8, 5)])
def test_more_than_the_model_takes_at_a_time(digits_run: Path, labels: tuple[int, ...]) -> None:
    """The later ones go on where the first ones ended: in the random numbers, and in the classes."""
    opened = OpenRun.open(str(digits_run))
    n = BATCH + 6
    found = Draw(n, 0.7, 3, labels).drawn(opened.model, opened.n_bins)
    turn = labels or tuple(range(10))
    y = torch.tensor([turn[i % len(turn)] for i in range(n)])
    generator = torch.Generator().manual_seed(3)
    wanted = [opened.model.sample(len(part), 0.7, y=part, generator=generator) for part in y.split(BATCH)]
    assert found.labels is not None
    assert torch.equal(found.labels, y)
    assert torch.equal(found.pixels, to_pixels(torch.cat(wanted), opened.n_bins))
    assert not torch.equal(found.pixels[BATCH:], found.pixels[:6])
