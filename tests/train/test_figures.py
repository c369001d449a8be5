"""Pictures: every image is there, enlarged without smoothing; texts survive, animations lose nothing, axes show all."""

from __future__ import annotations

import io
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pyglow_fast.data import Augmentation, ImageSet
from pyglow_fast.train import grid, histogram_png, to_pixels
from pyglow_fast.train.figures import (
    animation_bytes,
    bits_png,
    curve_png,
    example_grid,
    image_picture,
    pictures,
    png_bytes,
)

TEXTS = {
    "Command": "pyglow-fast sample 'runs/emoji: 日本 ☺ ü'\nsecond line <&>\"",
    "Empty": "",
}


def decoded(data: bytes) -> list[Tensor]:
    """Every frame as uint8 (3, H, W)."""
    frames = []
    with Image.open(io.BytesIO(data)) as image:
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            shown = image.convert("RGB")
            flat = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8)
            frames.append(flat.reshape(shown.height, shown.width, 3).permute(2, 0, 1))
    return frames


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_as_a_picture(channels: int) -> None:
    pixels = torch.randint(17, (channels, 3, 4))
    shown = pixels[:3] if channels >= 3 else pixels[:1].expand(3, -1, -1)
    expected = (shown * 255 / 16).round().to(torch.uint8)
    assert torch.equal(image_picture(pixels, 17, 1), expected)
    twice = image_picture(pixels, 17, 2)
    assert twice.shape == (3, 6, 8)
    assert all(torch.equal(twice[:, i::2, j::2], expected) for i in (0, 1) for j in (0, 1))


@pytest.mark.parametrize(("side", "size"), [(8, 256), (100, 300), (300, 300)])
def test_a_small_image_is_enlarged_to_256_pixels(side: int, size: int) -> None:
    image = torch.zeros(1, 1, side, side)
    assert image_picture(image[0], 2).shape == (3, size, size)
    assert decoded(animation_bytes(image, 2, "gif", None, "x"))[0].shape == (3, size, size)
    assert size <= grid(image, 2).shape[1] <= size + 20
    many = grid(image.expand(81, -1, -1, -1), 2).shape
    assert 64 * 9 * 0.9 < many[1] < max(64, side) * 9 + 100  # in a crowd each has about 64


def test_a_png_holds_the_pixels_and_texts() -> None:
    picture = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    data = png_bytes(picture, TEXTS)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.text == TEXTS
    assert torch.equal(decoded(data)[0], picture)


@pytest.mark.parametrize("file_format", ["gif", "webp"])
@pytest.mark.parametrize(
    ("pixels", "n_bins"),
    [
        (torch.randint(17, (3, 1, 8, 8)), 17),
        (torch.randint(6, (3, 3, 8, 8)), 6),  # 216 colours
        (torch.stack([torch.arange(256), 255 - torch.arange(256)]).reshape(2, 1, 16, 16), 256),
        (torch.arange(4).reshape(1, 1, 2, 2), 4),
        (torch.eye(9).reshape(9, 1, 3, 3).long(), 2),  # changes at one pixel
    ],
    ids=["17 greys", "few colours", "all greys", "one", "one pixel"],
)
def test_an_animation_goes_there_and_back_and_loses_nothing(pixels: Tensor, n_bins: int, file_format: str) -> None:
    data = animation_bytes(pixels, n_bins, file_format, 2, "Command: x <&>")
    there = list(pictures(pixels, n_bins, 2))
    torch.testing.assert_close(decoded(data), [*there, *there[-2:0:-1]], rtol=0, atol=0)
    with Image.open(io.BytesIO(data)) as image:
        assert len(pixels) == 1 or image.info["loop"] == 0
        if file_format == "gif":
            assert image.info["comment"] == b"Command: x <&>"
        else:
            told = [element.text for element in ElementTree.fromstring(image.info["xmp"]).iter() if element.text]
            assert told == ["Command: x <&>"]


def places(picture: Tensor, image: Tensor) -> list[tuple[int, int]]:
    """Where (y, x) an image (3, h, w) stands in the picture, pixel by pixel: first its upper row, then the whole."""
    _, height, width = image.shape
    rows = picture.unfold(2, width, 1)[:, : picture.shape[1] - height + 1]
    same = (rows == image[:, None, None, 0]).all(dim=3).all(dim=0)
    found = [(int(y), int(x)) for y, x in same.nonzero()]
    return [(y, x) for y, x in found if torch.equal(picture[:, y : y + height, x : x + width], image)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("columns", [[], ["first", "the second of them", "x"]])
def test_rows_and_columns_are_in_line(channels: int, columns: list[str]) -> None:
    rows = [(text, torch.randint(17, (n, channels, 8, 8))) for text, n in (("a label of\ntwo lines", 3), ("", 2))]
    picture = grid(rows, 17, columns, 2, "title")
    found = [[places(picture, image) for image in pictures(pixels, 17, 2)] for _, pixels in rows]
    assert all(len(place) == 1 for row in found for place in row)
    (first, second, third), (below, right) = ([place[0] for place in row] for row in found)
    assert first[0] == second[0] == third[0] < below[0] == right[0]
    assert first[1] == below[1] < second[1] == right[1] < third[1]


def test_training_images_stand_where_samples_of_their_class_do() -> None:
    """As training sees them, here mirrored half of the time; a class without an image has no column."""
    pixels = torch.tensor([[4, 0], [9, 5]], dtype=torch.uint8).repeat(10, 1)[:, None, None]
    data = ImageSet("x", pixels, 17, torch.arange(20) % 2, ("a", "b"), augmentation=Augmentation(flip=True))
    found = example_grid(data, 16, 0, data.class_names)
    ways = [places(found, one) for one in pictures(torch.stack([pixels[0], pixels[0].flip(-1)]), 17, 64)]
    assert all(ways)
    assert [len(ways[0] + ways[1]), len({x for _, x in ways[0] + ways[1]})] == [8, 2]  # of four columns
    assert torch.equal(example_grid(data.subset([0, 2]), 4, 0, ("a", "b")), example_grid(data.subset([0, 2]), 4, 0))


def test_the_axis_shows_what_comes_later_and_every_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *to, **options: drawn.append(figure))
    bits = (9.0, 7.0, *[3.0] * 18, 2.9)
    rows: list[Any] = [
        {"step": step, "train_bpd": 3.5, "held_out_bpd": value, "train_subset_bpd": None}
        for step, value in enumerate(bits)
    ]
    bits_png(rows, {"PNG": 1.5, "histogram": 4.0})
    low, high = drawn[0].axes[0].get_ylim()
    assert 1.0 < low < 1.5
    assert 4.0 < high < 4.5
    curve_png({"short": [(1, 9.0), (2, 8.0)], "long": [(100, 3.0), (900, 2.0)]}, "bits/dim")
    assert drawn[1].axes[0].get_ylim()[1] > 8.0


def test_a_label_is_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as it stands: names of images may hold a $."""
    monkeypatch.setattr("support.figures.drawing", True)
    assert curve_png({"x": [(0, 1.0)]}, "bits/dim of folder:mi$x_^$3").startswith(b"\x89PNG")


def test_what_is_no_number_becomes_grey() -> None:
    assert to_pixels(torch.tensor([-0.5, math.nan, 0.0, 9.0]), 4).tolist() == [0, 2, 2, 3]


@pytest.mark.drawn
def test_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets fill the same bins with 100 %, and an image far away neither stretches the axis nor is hushed up."""
    drawn: list[tuple[Any, ...]] = []
    hist = Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda *args, **options: drawn.append((args[0], *hist(*args, **options))))
    generator = torch.Generator().manual_seed(5)
    own, foreign = torch.randn(3000, generator=generator), torch.randn(2000, generator=generator) + 4
    own[0] = 1e6
    with Image.open(io.BytesIO(histogram_png({"a_$1": own, "b$": foreign}, "t$"))) as picture:
        assert picture.size == (960, 540)
    (axes, first, edges, _), (_, second, others, _) = drawn
    assert np.array_equal(edges, others)
    assert edges[-1] < 20
    seen = [((values >= edges[0]) & (values <= edges[-1])).double().mean() * 100 for values in (own, foreign)]
    assert [first.sum(), second.sum()] == pytest.approx([float(share) for share in seen])
    assert min(seen) > 99.5
    beyond = sum(int(((values < edges[0]) | (values > edges[-1])).sum()) for values in (own, foreign))
    assert axes.get_xlabel() == f"bits/dim (less is more likely; {beyond} of 5000 images lie beyond this axis)"
    histogram_png({"a": torch.ones(3), "b": torch.ones(4)}, "equal scores")
