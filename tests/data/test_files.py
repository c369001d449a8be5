"""How image files become pixels, what is decoded at all, and that whatever is wrong is told in one line."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from support.web import headed
from torch import Tensor

from pyglow_fast.data import DataConfig, UnreadableImageError, load_data, read_single

FOLDER = DataConfig("folder:x")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def shown(levels: Tensor, n_bins: int) -> Image.Image:
    """Grey levels (1, H, W) as a picture shows them."""
    return Image.fromarray((levels[0] * (255 / (n_bins - 1))).round().to(torch.uint8).numpy())


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written where nobody else has any."""
    monkeypatch.chdir(tmp_path)


def contents(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(
    image: Image.Image | bytes,
    side: int,
    channels: int = 3,
    n_bins: int = 256,
    config: DataConfig = FOLDER,
    **options: Any,
) -> Tensor:
    """A file as a model on a folder sees it."""
    Path("x").write_bytes(image if isinstance(image, bytes) else contents(image))
    return read_single(Path("x"), "upload 1", config, (channels, side, side), n_bins, **options)


def refusal(data: bytes, **options: Any) -> str:
    """The message, which is one line and begins with the name."""
    with pytest.raises(UnreadableImageError) as caught:
        read(data, 8, **options)
    text = str(caught.value)
    assert text.startswith("upload 1: expected an image")
    assert "\n" not in text
    return text.removeprefix("upload 1: ")


@pytest.mark.parametrize(
    ("image", "channels", "level"),
    [
        (Image.new("RGB", (4, 4), (255, 0, 0)), 1, 76),  # the luma, 0.299 * 255
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 3, 255),  # on white
        (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), 3, 127),
        (Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16)), 1, 0x80),  # scaled, not clipped
    ],
)
def test_kinds_of_pixels(image: Image.Image, channels: int, level: int) -> None:
    assert read(image, 4, channels).unique().tolist() == [level]


@pytest.mark.parametrize(
    ("fit", "background", "columns"),
    [
        ("crop", "white", [76, 76, 150, 150]),  # red and green: the outer columns, blue, are cut off
        ("pad", "black", [29, 76, 150, 29]),
        ("pad", "grey", [29, 76, 150, 29]),
        ("stretch", "white", [29, 76, 150, 29]),
    ],
)
def test_a_file_becomes_a_square(fit: str, background: str, columns: list[int]) -> None:
    """8x4 pixels of blue, red, green and blue, two columns each; above and below them pad has the background."""
    colours = ("blue", "red", "lime", "blue")
    image = Image.new("RGB", (8, 4))
    for i, colour in enumerate(colours):
        image.paste(colour, (2 * i, 0, 2 * i + 2, 4))
    config = DataConfig("folder:x", fit=fit, background=background)
    side = 4 if fit == "crop" else 8
    found = read(image, side, 1, config=config)[0]
    middle = found[side // 2].tolist()
    assert middle == columns if fit == "crop" else middle[::2] == columns
    if fit == "pad":
        edge = {"black": 0, "grey": 128}[background]
        assert found[[0, 1, 6, 7]].unique().tolist() == [edge]
    clear = read(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 4, config=config)
    assert clear.unique().tolist() == [{"white": 255, "grey": 128, "black": 0}[background]]


def test_small_files_are_enlarged_counted_and_named(tmp_path: Path) -> None:
    """Icons of several sizes, transparent, grey and with a palette, in one folder."""
    for i, image in enumerate(
        (noise(40, 33), noise(5, 9), noise(9, 9).convert("P"), Image.new("LA", (7, 32), (9, 99)))
    ):
        image.save(tmp_path / f"{i}.png")
    with pytest.warns(
        UserWarning, match=r"3 of 4 images of folder:.* are smaller than 32x32 and enlarged, such as 1\.png"
    ):
        data = load_data(DataConfig(f"folder:{tmp_path}", size=32))
    assert (len(data), data.image_shape) == (4, (3, 32, 32))
    with pytest.raises(UnreadableImageError, match="expected an image of at least 32x32, found 5x9"):
        load_data(DataConfig(f"folder:{tmp_path}", size=32, enlarge=False))
    with pytest.warns(UserWarning, match="unreadable images are left out: 3 of 4"):
        assert len(load_data(DataConfig(f"folder:{tmp_path}", size=32, enlarge=False, on_unreadable="skip"))) == 1


@pytest.mark.parametrize("n_bits", [1, 5, 8])
def test_n_bits_drops_the_lower_bits(tmp_path: Path, n_bits: int) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    data = load_data(DataConfig(f"folder:{tmp_path}", size=16, gray=True, n_bits=n_bits))
    expected = [value // 2 ** (8 - n_bits) for value in range(256)]
    assert data.item(0).flatten().tolist() == expected
    assert read(Image.fromarray(values), 16, 1, data.n_bins).flatten().tolist() == expected


@pytest.mark.parametrize("n_bins", [2, 17, 32, 256])
def test_a_grey_level_that_was_shown_comes_back(n_bins: int) -> None:
    """Also of a picture whose pixels are enlarged, as a saved one's are."""
    every = torch.arange(n_bins, dtype=torch.uint8).repeat(256 // n_bins + 1)[:256].reshape(1, 16, 16)
    for channels in (1, 3):
        for side in (16, 32, 256):
            picture = shown(every, n_bins).resize((side, side), Image.Resampling.NEAREST)
            assert torch.equal(read(picture, 16, channels, n_bins), every.expand(channels, -1, -1))


def test_the_place_in_the_padding_is_that_of_training() -> None:
    """A digit saved as it is, 8x8, is where the run's own digits are."""
    own = load_data(DataConfig("digits")).item(5)
    for margin in range(4):
        config = DataConfig("digits", size=13, crop_margin=margin)
        shown(own, 17).save("own.png")
        found = read_single(Path("own.png"), "x", config, (1, 13, 13), 17)
        assert torch.equal(found, load_data(config).item(5))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"])
def test_pixels_are_counted_before_they_are_decoded(kind: str) -> None:
    data = contents(noise(32, 24), kind)
    assert read(data, 8, most_pixels=32 * 24).shape == (3, 8, 8)
    assert refusal(data, most_pixels=767) == "expected an image of at most 767 pixels, found 32x24"
    if kind != "WEBP":  # whose decoder wants the whole file before it tells the size
        # Its pixels cannot be decoded, which one who looks at them first would say.
        assert "of at most 9 pixels, found 32x24" in refusal(data[: len(data) * 3 // 4], most_pixels=9)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
# Where limits are given, a TIFF's tile may be larger than the image, and an ICO tells its size too late.
NOT_DECODED: dict[str, tuple[Callable[[], bytes], dict[str, Any], str]] = {
    "no image": (lambda: b"this is no image", {}, "that Pillow can decode, found cannot identify image file"),
    "half of one": (lambda: contents(noise(64, 64), "JPEG")[:1500], {}, "found image file is truncated"),
    "too small": (
        lambda: contents(noise(20, 7)),
        {"config": DataConfig("folder:x", enlarge=False)},
        "of at least 8x8, found 20x7",
    ),
    "32 bits": (lambda: contents(Image.new("F", (9, 9), 0.5), "TIFF"), {}, "found 'F' samples"),
    "a bomb": (lambda: headed(20000, 20000), {}, "could be decompression bomb"),
    "a large one": (lambda: headed(9000, 9000), {"most_pixels": 50}, "of at most 50 pixels, found 9000x9000"),
    "a program": (lambda: EPS, {}, "found cannot identify image file"),
    "TIFF": (lambda: contents(noise(9, 9), "TIFF"), {"most_pixels": 10**6}, "found cannot identify image file"),
    "ICO": (lambda: contents(noise(32, 32), "ICO"), {}, "found cannot identify image file"),
}


@pytest.mark.parametrize("case", NOT_DECODED)
def test_what_is_not_decoded(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: pytest.fail("it was started"))
    make, options, message = NOT_DECODED[case]
    assert message in refusal(make(), **options)
