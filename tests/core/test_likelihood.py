"""From pixels to x and back, and bits per dimension."""

from __future__ import annotations

import math

import pytest
import torch

from pyglow_fast.likelihood import bits_per_dim, dequantize, not_finite, quantize

INTEGER_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]


class TestDequantize:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n_bins", [17, 256, 65536])
    def test_stays_in_its_bin(self, n_bins: int, dtype: torch.dtype) -> None:
        # Enough draws to hit the edges of the bins: one in 2^24 of float32's uniform numbers is 0.
        pixels = torch.arange(n_bins).repeat(math.ceil(2_000_000 / n_bins))
        x = dequantize(pixels, n_bins, dtype=dtype)
        assert x.dtype == dtype
        assert x.min() >= -0.5
        assert x.max() < 0.5
        assert torch.equal(quantize(x, n_bins), pixels)

    @pytest.mark.parametrize("edge", [0.0, 1.0])
    @pytest.mark.parametrize("n_bins", [2, 17, 255, 256, 1000, 65536])
    def test_noise_at_the_edge_stays_in_its_bin(
        self, monkeypatch: pytest.MonkeyPatch, n_bins: int, edge: float
    ) -> None:
        draw = torch.nextafter(torch.tensor(edge), torch.tensor(0.0))  # 0, or the largest number below 1
        monkeypatch.setattr(torch, "rand", lambda shape, dtype, **_: torch.full(shape, float(draw), dtype=dtype))
        pixels = torch.arange(n_bins)
        assert torch.equal(quantize(dequantize(pixels, n_bins), n_bins), pixels)

    def test_noise_is_uniform(self) -> None:
        n, n_bins = 100_000, 8
        noise = (dequantize(torch.full((n,), 5), n_bins, dtype=torch.float64) + 0.5) * n_bins - 5.0
        # Six standard errors: mean 1/2 of variance 1/12, second moment 1/3 of variance 4/45, tenths of the interval.
        assert abs(float(noise.mean()) - 0.5) < 6.0 * math.sqrt(1.0 / 12.0 / n)
        assert abs(float(noise.square().mean()) - 1.0 / 3.0) < 6.0 * math.sqrt(4.0 / 45.0 / n)
        counts = torch.histc(noise, 10, 0.0, 1.0)
        assert (counts - n / 10).abs().max() < 6.0 * math.sqrt(n * 0.1 * 0.9)

    @pytest.mark.parametrize("dtype", INTEGER_DTYPES, ids=str)
    def test_any_integer_dtype(self, dtype: torch.dtype) -> None:
        pixels = torch.arange(100).reshape(2, 2, 25)
        images = pixels.to(dtype)
        x = dequantize(images, 128)
        assert x.shape == images.shape
        assert torch.equal(quantize(x, 128), pixels)
        assert torch.equal(images.long(), pixels), "the images were changed"
        assert dequantize(images[:0], 128).shape == (0, 2, 25)


def test_quantize_floors_and_clamps() -> None:
    x = torch.tensor([-9.0, -0.5, -0.26, -0.25, -0.01, 0.0, 0.24, 0.25, 0.49, 0.5, 9.0, math.inf, -math.inf])
    assert quantize(x, 4).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_image_with_one_value_that_is_not_finite_counts(bad: float) -> None:
    x = torch.zeros(4, 1, 2, 2)
    x[1, 0, 1, 0] = bad
    x[3] = bad
    assert not_finite(x) == [1, 3]
    assert not_finite(x[:0]) == []


def test_a_uniform_density_costs_the_bits_of_its_grey_levels() -> None:
    # p(x) = 1 on [-0.5, 0.5)^D: every level costs log2(n_bins) bits. Where p(x) = n_bins^D the level is known.
    for n_bins in (2, 17, 256):
        certain = 12 * math.log(n_bins)
        found = bits_per_dim(torch.tensor([0.0, certain], dtype=torch.float64), 12, n_bins)
        assert found.tolist() == pytest.approx([math.log2(n_bins), 0.0], abs=1e-14)
