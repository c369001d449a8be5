"""One file as what a model sees: scaled, padded and cut as the held-out images of its source are."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pyglow_fast.data import DataConfig, Preparation, UnreadableImageError, load_data, read_single
from pyglow_fast.data.decode import pixels, to_square
from pyglow_fast.data.prepare import rebinned
from pyglow_fast.train.figures import image_picture, png_bytes


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def contents(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def read(image: Image.Image, config: DataConfig, shape: tuple[int, int, int], n_bins: int = 256) -> Tensor:
    return read_single(contents(image), "upload", config, shape, n_bins)


BINS = [2, 4, 8, 16, 17, 32, 64, 128, 256]


@pytest.mark.parametrize("n_bins", BINS)
def test_a_grey_level_that_was_shown_comes_back(n_bins: int) -> None:
    """Every grey level of every number of them that occurs, by way of the file."""
    every = torch.arange(n_bins, dtype=torch.uint8).repeat(256 // n_bins + 1)[:256].reshape(1, 16, 16)
    shown = [round(255 * level / (n_bins - 1)) for level in range(n_bins)]
    picture = image_picture(every, n_bins)
    assert picture[0].flatten()[:n_bins].tolist() == shown
    for channels in (1, 3):
        found = read_single(png_bytes(picture), "x", DataConfig("folder:x"), (channels, 16, 16), n_bins)
        assert found.dtype == torch.uint8
        assert torch.equal(found, every.expand(channels, -1, -1))


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_levels_are_those_of_training(n_bits: int) -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(rebinned(values, 1 << n_bits), Preparation(n_bits=n_bits).to_pixels(values.clone()))


def test_all_levels_are_reached_and_none_is_beyond() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    for n_bins in range(2, 257):
        found = rebinned(values, n_bins)
        assert found.unique().tolist() == list(range(n_bins))
        assert bool((found.int().diff() >= 0).all())


@pytest.mark.parametrize("options", [{}, {"gray": True}, {"n_bits": 5}, {"crop_margin": 3, "flip": True}, {"size": 8}])
@pytest.mark.parametrize("size", [(40, 40), (50, 41), (41, 60)])
def test_a_file_is_read_as_the_folder_it_lies_in(
    tmp_path: Path, options: dict[str, Any], size: tuple[int, int]
) -> None:
    noise(*size).save(tmp_path / "x.png")
    config = DataConfig(f"folder:{tmp_path}", **options)
    data = load_data(config)
    expected = data.batch(torch.tensor([0]))[0][0]
    found = read_single(tmp_path / "x.png", "x", config, data.image_shape, data.n_bins)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "own", "size", "shape", "margin"),
    [
        ("mnist", 28, (60, 40), (1, 32, 32), 0),
        ("fashion-mnist", 28, (28, 28), (1, 32, 32), 3),
        ("mnist", 28, (28, 56), (1, 28, 28), 2),
        ("cifar10:x", 32, (33, 64), (3, 40, 40), 0),
        ("digits", 8, (30, 20), (1, 16, 16), 1),
        ("digits", 8, (8, 11), (1, 8, 8), 0),
    ],
)
def test_sources_of_one_size_are_scaled_to_it_and_padded(
    name: str, own: int, size: tuple[int, int], shape: tuple[int, int, int], margin: int
) -> None:
    n_bins = 17 if name == "digits" else 256
    image = noise(*size)
    found = read(image, DataConfig(name, size=shape[1], crop_margin=margin), shape, n_bins)
    small = pixels(to_square(image.convert("L" if shape[0] == 1 else "RGB"), own, "x"))
    before = (shape[1] + margin - own) // 2 - margin // 2
    expected = torch.zeros(shape, dtype=torch.int64)
    expected[:, before : before + own, before : before + own] = small.long() * n_bins // 256
    assert found.shape == shape
    assert torch.equal(found.long(), expected)


def test_the_place_in_the_padding_is_that_of_training() -> None:
    """A digit saved as it is, 8x8, is where the run's own digits are."""
    for margin in (0, 1, 2, 3):
        config = DataConfig("digits", size=13, crop_margin=margin)
        own = load_data(DataConfig("digits")).batch(torch.tensor([5]))[0][0]
        expected = load_data(config).batch(torch.tensor([5]))[0][0]
        found = read_single(png_bytes(image_picture(own, 17)), "x", config, (1, 13, 13), 17)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["digits", "folder:x"])
def test_an_image_of_the_size_of_the_model_is_taken_as_it_is(name: str) -> None:
    own = torch.randint(16, (1, 16, 16), dtype=torch.uint8)
    config = DataConfig(name, size=16, crop_margin=5)
    found = read_single(png_bytes(image_picture(own, 16)), "x", config, (1, 16, 16), 16)
    assert torch.equal(found, own)


def test_upright_before_it_is_measured_and_transparency_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image = Image.new("L", (8, 4), 0)
    image.paste(255, (0, 0, 8, 2))
    found = read_single(contents(image, exif=exif), "x", DataConfig("folder:x", size=4), (1, 4, 4), 2)
    assert found[0].tolist() == [[0, 0, 1, 1]] * 4  # what was above is at the right
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert read(clear, DataConfig("folder:x"), (3, 4, 4)).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("name", "size", "shape", "margin", "message"),
    [
        ("folder:x", (20, 7), (1, 8, 8), 0, "upload: expected an image of at least 8x8, found 20x7"),
        ("folder:x", (9, 9), (1, 8, 8), 2, "upload: expected an image of at least 10x10, found 9x9"),
        ("mnist", (27, 90), (1, 32, 32), 4, "upload: expected an image of at least 28x28, found 27x90"),
    ],
)
def test_small_files(name: str, size: tuple[int, int], shape: tuple[int, int, int], margin: int, message: str) -> None:
    with pytest.raises(UnreadableImageError, match="^" + message):
        read(noise(*size), DataConfig(name, size=shape[1], crop_margin=margin), shape)


@pytest.mark.parametrize(
    ("shape", "n_bins", "message"),
    [
        ((2, 8, 8), 256, r"image_shape: expected \(C, side, side\) with 1 or 3 channels, found \(2, 8, 8\)"),
        ((3, 8, 4), 256, r"image_shape: expected .* found \(3, 8, 4\)"),
        ((3, 8), 256, r"image_shape: expected .* found \(3, 8\)"),
        ((1, 4, 4), 17, r"image_shape: expected sides of at least 8, as digits has, found \(1, 4, 4\)"),
        ((1, 8, 8), 1, r"n_bins: expected a number of grey levels in 2\.\.256, found 1"),
        ((1, 8, 8), 257, "n_bins: expected"),
        ((1, 8, 8), math.nan, "n_bins: expected .* found nan"),
    ],
)
def test_models_that_no_file_fits(shape: Any, n_bins: int, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        read(noise(20, 20), DataConfig("digits"), shape, n_bins)


def test_what_is_decoded_at_all_is_passed_on() -> None:
    data = contents(noise(20, 20))
    for options, found in (({"most_pixels": 399}, "at most 399 pixels, found 20x20"), ({"formats": ["GIF"]}, "GIF")):
        with pytest.raises(UnreadableImageError, match="^upload: expected an image .*" + found):
            read_single(data, "upload", DataConfig("folder:x"), (1, 8, 8), 256, **options)  # type: ignore[arg-type]
