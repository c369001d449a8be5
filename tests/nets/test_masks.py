"""Masks of sequences: what is refused, how samples are grouped, and that cutting changes nothing."""

from __future__ import annotations

import pytest
import torch
from support.glow_tts_cases import mask_of_lengths
from torch import Tensor, nn

from pyglow_fast.nets import masks


def test_groups_are_of_like_lengths() -> None:
    ends = [100, 30, 85, 79, 64, 31]
    groups = masks.groups_alike(ends)
    assert groups == [[0, 2], [3, 4], [5, 1]]
    for group in groups:
        assert min(ends[i] for i in group) >= masks.ALIKE * max(ends[i] for i in group)


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 3, 7), (4, 2, 1), (0, 0, 0)])
@pytest.mark.parametrize("positions", [None, 1, 9])
def test_cutting_by_length_changes_nothing(lengths: tuple[int, ...], positions: int | None) -> None:
    x, mask = torch.randn(3, 2, 9, dtype=torch.float64), mask_of_lengths(lengths, 9)
    cond = None if positions is None else torch.randn(3, 2, positions, dtype=torch.float64)
    weight = torch.randn(4, 2, 3, dtype=torch.float64)
    widths = []

    def call(x: Tensor, cond: Tensor | None, mask: Tensor) -> Tensor:
        widths.append(x.shape[0] * x.shape[2])
        out = nn.functional.conv1d(x * mask, weight, padding=1)
        return (out if cond is None else out + cond.repeat(1, 2, 1)) * mask

    found = masks.run_by_length(call, x, cond, mask)
    work = sum(widths)
    assert torch.allclose(found, call(x, cond, mask), rtol=1e-13, atol=1e-13)
    assert work <= 27
    assert lengths == (9, 9, 9) or work < 27
