"""Pictures as files: their pixels, the texts in them, and animations that lose nothing."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from torch import Tensor

from pyglow_fast.train import class_columns, class_cycle, to_pixels
from pyglow_fast.train.figures import (
    LONGEST_TEXT,
    animation_bytes,
    enlarged,
    grid,
    image_picture,
    pictures,
    png_bytes,
    save_grid,
    save_picture,
)

TEXTS = {
    "Description": "seed 7, temperature 0.7",
    "Command": "pyglow-fast sample 'runs/emoji: 日本 ☺ ü'\n\tsecond line <&>\"",
    "Umlaut": "Größe",
    "Empty": "",
    "a b": "x" * LONGEST_TEXT,
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


def written(picture: Tensor, **options: Any) -> bytes:
    """The PNG as Pillow alone writes it."""
    stream = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(stream, "PNG", **options)
    return stream.getvalue()


def test_a_png_holds_the_pixels_and_nothing_else(tmp_path: Path) -> None:
    picture = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    data = png_bytes(picture)
    assert torch.equal(decoded(data)[0], picture)
    assert data == png_bytes(picture, {}) == written(picture)
    save_picture(picture, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == data
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_texts_survive_in_a_png(tmp_path: Path) -> None:
    picture = torch.randint(256, (3, 4, 4), dtype=torch.uint8)
    save_picture(picture, tmp_path / "x.png", TEXTS)
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        assert image.text == TEXTS
    assert torch.equal(decoded((tmp_path / "x.png").read_bytes())[0], picture)


def test_a_grid_takes_texts_too(tmp_path: Path) -> None:
    pixels = torch.randint(5, (3, 1, 4, 4))
    save_grid(pixels, 5, tmp_path / "x.png", columns=2, scale=2, text={"Seed": "3"})
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        assert image.text == {"Seed": "3"}
    assert torch.equal(decoded((tmp_path / "x.png").read_bytes())[0], grid(pixels, 5, 2, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"": "x"}, "text: expected keywords of 1 to 79 ASCII characters.*found ''"),
        ({"k" * 80: "x"}, "text: expected keywords of 1 to 79 ASCII"),
        ({" a": "x"}, "text: expected keywords"),
        ({"a  b": "x"}, "text: expected keywords"),
        ({"a\0b": "x"}, "text: expected keywords"),
        ({"ü": "x"}, "text: expected keywords"),
        ({3: "x"}, "text: expected keywords .* found 3"),
        ({"a": 3}, r"text\['a'\]: expected a string, found int"),
        ({"a": "x\0IEND"}, r"text\['a'\]: expected characters other than control characters, found '\\x00'"),
        ({"a": "x\r"}, r"text\['a'\]: expected characters other than control characters, found '\\r'"),
        ({"a": "\x1b[2J"}, r"text\['a'\]: expected characters other than control characters, found '\\x1b'"),
        ({"a": "\udce9"}, r"text\['a'\]: expected characters other than control characters, found '\\udce9'"),
        ({"a": "x" * (LONGEST_TEXT + 1)}, r"text\['a'\]: expected at most 65536 characters, found 65537"),
        ([("a", "b")], "text: expected a mapping from keywords to texts, found list"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, text: Any, message: str) -> None:
    (tmp_path / "x.png").write_bytes(b"before")
    picture = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="^" + message):
        save_picture(picture, tmp_path / "x.png", text)
    assert (tmp_path / "x.png").read_bytes() == b"before"
    for file_format in ("gif", "webp"):
        with pytest.raises(ValueError, match="^" + message):
            animation_bytes(picture[None], 256, file_format, text=text)


@pytest.mark.parametrize(
    "picture", [torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4), torch.zeros(3), None]
)
def test_what_is_no_picture_is_refused(picture: Any) -> None:
    with pytest.raises(ValueError, match=r"^picture: expected uint8 of shape \(3, H, W\), found"):
        png_bytes(picture)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_as_a_picture(channels: int) -> None:
    pixels = torch.randint(17, (channels, 3, 4))
    shown = pixels[:3] if channels >= 3 else pixels[:1].expand(3, -1, -1)
    expected = torch.tensor([[[round(255 * int(v) / 16) for v in row] for row in part] for part in shown])
    assert torch.equal(image_picture(pixels, 17), expected.to(torch.uint8))
    twice = image_picture(pixels, 17, 2)
    assert twice.shape == (3, 6, 8)
    for i in (0, 1):
        for j in (0, 1):
            assert torch.equal(twice[:, i::2, j::2], expected.to(torch.uint8))


@pytest.mark.parametrize(
    ("pixels", "scale", "message"),
    [
        (torch.zeros(1, 1, 4, 4), 1, r"pixels: expected one image \(C, H, W\), found \(1, 1, 4, 4\)"),
        (None, 1, r"pixels: expected one image \(C, H, W\), found NoneType"),
        (torch.zeros(1, 4, 4), 0, "scale: expected an int, at least 1, found 0"),
        (torch.zeros(1, 4, 4), 1.5, "scale: expected an int, at least 1, found 1.5"),
    ],
)
def test_what_is_no_image_is_refused(pixels: Any, scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        image_picture(pixels, 17, scale)


CASES = {
    "grey": (torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(1)), 256),
    "17 grey levels": (torch.randint(17, (3, 1, 8, 8), generator=torch.Generator().manual_seed(2)), 17),
    "few colours": (torch.randint(6, (3, 3, 8, 8), generator=torch.Generator().manual_seed(3)), 6),  # 216 of them
    "all greys": (torch.stack([torch.arange(256), 255 - torch.arange(256)]).reshape(2, 1, 16, 16), 256),
    "two": (torch.tensor([[[[0, 1]]], [[[1, 0]]]]), 2),
    "one": (torch.arange(4).reshape(1, 1, 2, 2), 4),
    "changes at one pixel": (torch.eye(9).reshape(9, 1, 3, 3).long(), 2),
}


@pytest.mark.parametrize("file_format", ["gif", "webp"])
@pytest.mark.parametrize("name", CASES)
def test_an_animation_goes_there_and_back_and_loses_nothing(name: str, file_format: str) -> None:
    pixels, n_bins = CASES[name]
    data = animation_bytes(pixels, n_bins, file_format, 120, scale=2)
    there = list(pictures(pixels, n_bins, 2))
    expected = [*there, *there[-2:0:-1]]
    found = decoded(data)
    assert len(found) == max(1, 2 * len(pixels) - 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == file_format.upper()
        if len(pixels) > 1:
            assert image.info["loop"] == 0
            durations = []
            for i in range(image.n_frames):
                image.seek(i)
                image.load()
                durations.append(image.info["duration"])
            assert durations == [120] * image.n_frames


def test_a_webp_loses_nothing_of_many_colours() -> None:
    pixels = torch.randint(256, (3, 3, 16, 16))
    assert len(pictures(pixels, 256, 1)[0].flatten(1).unique(dim=1).mT) > 250
    found = decoded(animation_bytes(pixels, 256, "webp", scale=1))
    assert all(torch.equal(a, b) for a, b in zip(found, pictures(pixels[[0, 1, 2, 1]], 256, 1), strict=True))


def test_a_gif_of_many_colours_is_near_them_without_a_pattern() -> None:
    """A smooth ramp: dithering would mix far colours among neighbours, which here would break the order of the ramp."""
    ramp = torch.arange(32).reshape(1, 1, 1, 32).expand(2, 1, 32, 32)
    pixels = torch.cat([ramp, ramp.mT, torch.full((2, 1, 32, 32), 3)], 1) * 8
    found = decoded(animation_bytes(pixels, 256, "gif", scale=1))
    for frame, expected in zip(found, pictures(pixels, 256, 1), strict=False):
        # 1024 colours in 256 boxes: each is about four colours wide, two along either side, and 8 grey levels a step.
        assert int((frame.int() - expected.int()).abs().max()) <= 3 * 8
        assert bool((frame[0].int().diff(dim=1) >= 0).float().mean() > 0.95)


@pytest.mark.parametrize("file_format", ["gif", "webp"])
def test_images_that_do_not_change_are_shown_for_as_long(file_format: str) -> None:
    pixels = torch.tensor([0, 0, 1, 1]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    with Image.open(io.BytesIO(animation_bytes(pixels, 2, file_format, 50))) as image:
        total = 0
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            total += image.info["duration"]
    assert total == 6 * 50


def test_texts_of_animations() -> None:
    lines = "\n".join(f"{keyword}: {value}" for keyword, value in TEXTS.items())
    pixels = torch.arange(2).reshape(2, 1, 1, 1)
    with Image.open(io.BytesIO(animation_bytes(pixels, 2, "gif", text=TEXTS))) as image:
        assert image.info["comment"].decode() == lines
    with Image.open(io.BytesIO(animation_bytes(pixels, 2, "webp", text=TEXTS))) as image:
        found = [element.text for element in ElementTree.fromstring(image.info["xmp"]).iter() if element.text]
        assert found == [lines]
    for file_format in ("gif", "webp"):
        with Image.open(io.BytesIO(animation_bytes(pixels, 2, file_format))) as image:
            assert not {"comment", "xmp"} & set(image.info)


def test_an_animation_is_about_64_pixels_high_unless_told_otherwise() -> None:
    pixels = torch.arange(2).reshape(2, 1, 1, 1).expand(2, 1, 10, 10)
    assert decoded(animation_bytes(pixels, 2, "gif"))[0].shape[1:] == enlarged(pixels, 2).shape[2:] == (60, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file_format": "png"}, r"file_format: expected one of \('gif', 'webp'\), found 'png'"),
        ({"pixels": torch.zeros(0, 1, 2, 2)}, r"pixels: expected at least one image \(n, C, H, W\), found \(0, 1, 2"),
        ({"pixels": torch.zeros(1, 2, 2)}, r"pixels: expected at least one image .* found \(1, 2, 2\)"),
        ({"milliseconds": 19}, r"milliseconds: expected a whole number in 20\.\.60000, found 19"),
        ({"milliseconds": 60001}, "milliseconds: expected"),
        ({"milliseconds": math.nan}, "milliseconds: expected .* found nan"),
        ({"scale": 0}, "scale: expected an int, at least 1, found 0"),
    ],
)
def test_animations_that_are_refused(options: dict[str, Any], message: str) -> None:
    values = {"pixels": torch.zeros(2, 1, 2, 2), "n_bins": 2, "file_format": "gif"} | options
    with pytest.raises(ValueError, match="^" + message):
        animation_bytes(**values)


def test_grid(tmp_path: Path) -> None:
    pixels = torch.tensor([[[[0, 4]]], [[[2, 0]]], [[[4, 4]]]])
    save_grid(pixels, 5, tmp_path / "x.png", columns=2, scale=3)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 * (2 * 3 + 2) + 2, 2 * (3 + 2) + 2)
        assert picture.getpixel((2, 2)) == (0, 0, 0)
        assert picture.getpixel((5, 4)) == (255, 255, 255)
        assert picture.getpixel((10, 2)) == (128, 128, 128)
        assert picture.getpixel((0, 0)) == (128, 128, 128)  # between the images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grid_of_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    save_grid(torch.zeros(2, channels, 4, 4, dtype=torch.int64), 2, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "RGB"


def test_each_class_has_its_column() -> None:
    columns = class_columns(80, 10)
    labels = class_cycle(80, 10, torch.device("cpu"))
    assert columns == 10
    assert labels is not None
    assert labels.reshape(-1, columns).unique(dim=0).tolist() == [list(range(10))]
    assert [class_columns(*case) for case in ((64, None), (5, 10), (64, 1), (64, 40))] == [None] * 4
    assert class_cycle(4, None, torch.device("cpu")) is None


def test_what_is_no_number_becomes_grey() -> None:
    assert to_pixels(torch.tensor([-0.5, math.nan, 0.0, 9.0]), 4).tolist() == [0, 2, 2, 3]
