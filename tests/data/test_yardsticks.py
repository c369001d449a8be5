"""The yardsticks against values worked out by hand."""

from __future__ import annotations

import io
import math

import pytest
import torch
from PIL import Image
from torch import Tensor

from pyglow_fast.data import ImageSet, histogram_bits_per_dim, measure_yardsticks, png_bits_per_dim
from pyglow_fast.data.yardsticks import _layouts


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


def test_histogram_of_an_unseen_set_is_uniform() -> None:
    train = image_set([[3]], 16)
    # One image: its level has p = 2/17, each of the others 1/17.
    assert histogram_bits_per_dim(train, image_set([[3]], 16)) == pytest.approx(-math.log2(2 / 17), rel=1e-12)
    assert histogram_bits_per_dim(train, image_set([[9]], 16)) == pytest.approx(math.log2(17), rel=1e-12)


def test_histogram_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(8, (40, 3, 4, 4), dtype=torch.uint8)
    train, test = image_set(pixels[:30], 8), image_set(pixels[30:], 8)
    whole = histogram_bits_per_dim(train, test)
    monkeypatch.setattr("pyglow_fast.data.yardsticks._COUNTS_MAX", 5 * 8)
    assert histogram_bits_per_dim(train, test) == pytest.approx(whole, rel=1e-12)


def test_histogram_refuses_sets_that_differ() -> None:
    with pytest.raises(ValueError, match="test: expected n_bins 4, found 8"):
        histogram_bits_per_dim(image_set([[0]], 4), image_set([[0]], 8))
    with pytest.raises(ValueError, match="test: expected images of shape"):
        histogram_bits_per_dim(image_set([[0]], 4), image_set([[0, 0]], 4))


def test_sheets_hold_every_pixel_once_and_in_place() -> None:
    pixels = torch.arange(6 * 3 * 2 * 2, dtype=torch.uint8).reshape(6, 3, 2, 2)
    sheets = {tuple(sheet.shape): sheet for sheet in _layouts(pixels)}
    assert set(sheets) == {(6, 4, 3), (12, 2, 3)}
    for (height, width, _), sheet in sheets.items():
        across = width // 2
        for i in range(6):
            row, column = 2 * (i // across), 2 * (i % across)
            assert torch.equal(sheet[row : row + 2, column : column + 2].permute(2, 0, 1), pixels[i])
        assert height * width * 3 == pixels.numel()


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_png_of_noise_costs_what_noise_costs(channels: int) -> None:
    pixels = torch.randint(256, (64, channels, 16, 16), dtype=torch.uint8)
    bits, count = png_bits_per_dim(image_set(pixels, 256))
    assert count == 64
    assert 8.0 <= bits < 8.15  # headers amortised over the whole sheet


def test_png_of_few_levels_costs_their_entropy() -> None:
    bits, _ = png_bits_per_dim(image_set(torch.randint(4, (256, 1, 16, 16), dtype=torch.uint8), 4))
    assert 2.0 <= bits < 2.4


def test_png_is_no_larger_than_the_plain_one() -> None:
    pixels = (torch.arange(32).reshape(1, 1, 1, 32) + torch.arange(40).reshape(40, 1, 1, 1)).expand(40, 1, 32, 32)
    data = image_set(pixels.to(torch.uint8).contiguous(), 256)
    buffer = io.BytesIO()
    Image.fromarray(data.pixels.reshape(40 * 32, 32).numpy()).save(buffer, "PNG", optimize=True)
    assert png_bits_per_dim(data)[0] <= 8 * buffer.tell() / (40 * 32 * 32)


def test_png_of_a_large_set_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyglow_fast.data.yardsticks.PNG_MAX_VALUES", 3 * 64)
    data = image_set(torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8), 256)
    found = measure_yardsticks(None, data)
    assert [(item.name, item.images) for item in found] == [("PNG", 3)]
    assert "3 tiled images" in found[0].how


def test_both_together() -> None:
    pixels = torch.randint(4, (30, 1, 4, 4), dtype=torch.uint8)
    train, test = image_set(pixels[:20], 4), image_set(pixels[20:], 4)
    histogram, png = measure_yardsticks(train, test)
    assert histogram.bits_per_dim == histogram_bits_per_dim(train, test)
    assert "20 training images" in histogram.how
    assert png.bits_per_dim == png_bits_per_dim(test)[0]
