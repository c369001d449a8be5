"""The yardsticks against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyglow_fast.data import ImageSet, histogram_bits_per_dim, measure_yardsticks, png_bits_per_dim


def image_set(pixels: Tensor | list[list[int]], n_bins: int) -> ImageSet:
    """Rows of a list are images of one row of pixels."""
    tensor = torch.as_tensor(pixels, dtype=torch.uint8)
    return ImageSet("test", tensor if tensor.dim() == 4 else tensor[:, None, None, :], n_bins)


def test_histogram_by_hand() -> None:
    train = image_set([[0, 2], [0, 1], [1, 2]], 3)
    test = image_set([[0, 2], [2, 0]], 3)
    # Pixel 0 counts (2, 1, 0), pixel 1 counts (0, 1, 2); three images, three grey levels: p = (count + 1) / 6.
    expected = -(math.log2(3 / 6) + math.log2(3 / 6) + math.log2(1 / 6) + math.log2(1 / 6)) / 4
    assert histogram_bits_per_dim(train, test) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("channels", "levels", "high"), [(1, 256, 8.15), (2, 256, 8.15), (3, 256, 8.15), (1, 4, 2.4)])
def test_png_of_noise_costs_its_entropy(channels: int, levels: int, high: float) -> None:
    pixels = torch.randint(levels, (256, channels, 16, 16), dtype=torch.uint8)
    bits, count = png_bits_per_dim(image_set(pixels, levels))
    assert count == 256
    assert math.log2(levels) <= bits < high  # headers amortised over the whole sheet


def test_both_together_and_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(4, (30, 1, 8, 8), dtype=torch.uint8)
    train, test = image_set(pixels[:20], 4), image_set(pixels[20:], 4)
    histogram, png = measure_yardsticks(train, test)
    assert histogram.bits_per_dim == histogram_bits_per_dim(train, test)
    assert "20 training images" in histogram.how
    assert (png.bits_per_dim, png.images) == (png_bits_per_dim(test)[0], 10)
    monkeypatch.setattr("pyglow_fast.data.yardsticks.PNG_MAX_VALUES", 3 * 64)
    (part,) = measure_yardsticks(None, test)
    assert (part.name, part.images) == ("PNG", 3)
    assert "3 of 10 tiled images" in part.how or "3 tiled images" in part.how
