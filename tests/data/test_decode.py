"""What is decoded at all: kinds of files, how many pixels, and that whatever is wrong is told in one line."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from pyglow_fast.data import UnreadableImageError
from pyglow_fast.data.decode import decode

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def encoded(file_format: str, **options: Any) -> bytes:
    """The noise as a file of a format, 32x24."""
    stream = io.BytesIO()
    Image.fromarray(NOISE).save(stream, file_format, **options)
    return stream.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    """A grey PNG whose header says a size; with no pixels unless they are given."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + rows + chunk(b"IEND", b"")


def refusal(source: Path | bytes, **options: Any) -> str:
    """The message, which is one line and begins with the name."""
    with pytest.raises(UnreadableImageError) as caught:
        decode(source, "upload 1", False, **options)
    text = str(caught.value)
    assert text.startswith("upload 1: expected an image")
    assert "\n" not in text
    return text.removeprefix("upload 1: ")


@pytest.mark.parametrize("file_format", FORMATS)
def test_the_pixels_are_counted_before_they_are_decoded(file_format: str) -> None:
    data = encoded(file_format)
    assert decode(data, "x", False, 32 * 24).size == (32, 24)
    assert refusal(data, most_pixels=32 * 24 - 1) == "expected an image of at most 767 pixels, found 32x24"
    if file_format != "WEBP":  # whose decoder wants the whole file before it tells the size
        # Its pixels cannot be decoded, which one who looks at them first would say.
        assert "of at most 9 pixels, found 32x24" in refusal(data[: len(data) * 3 // 4], most_pixels=9)


@pytest.mark.parametrize("strict", [False, True])
def test_what_pillow_takes_for_a_bomb_is_told_in_the_same_way(strict: bool) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    assert limit is not None
    huge, large = png(20000, 20000), png(10000, 10000)  # above twice the limit, and above the limit
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        assert refusal(huge) == f"expected an image of at most {2 * limit} pixels, found 400000000 of them"
        assert refusal(huge, most_pixels=50) == "expected an image of at most 50 pixels, found 400000000 of them"
        found = "100000000 of them" if strict else "10000x10000"
        assert refusal(large, most_pixels=50) == f"expected an image of at most 50 pixels, found {found}"
        if strict:
            assert refusal(large) == f"expected an image of at most {limit} pixels, found 100000000 of them"


@pytest.mark.parametrize("file_format", ["ICO", "ICNS", "AVIF"])
def test_a_file_within_a_file_is_not_decoded_to_learn_its_size(file_format: str) -> None:
    """Its head may say another; without a limit of the caller's it is an image like others."""
    if file_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    stream = io.BytesIO()
    Image.fromarray(NOISE).resize((32, 32)).save(stream, file_format)
    data = stream.getvalue()
    assert min(decode(data, "x", False).size) >= 16
    assert "cannot identify image file" in refusal(data, most_pixels=10**9)


def tiled(tile: int) -> bytes:
    """A TIFF of 16 x 16 pixels that says it is stored in tiles of ``tile`` x ``tile``; it has 16 x 16 grey ones."""
    data = zlib.compress(bytes(16 * 16))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_the_tiles_of_a_tiff_are_measured_too() -> None:
    """One that is larger than the image is decoded as a whole: 1.5 MB would take 1.6 GB."""
    assert decode(tiled(16), "x", True, 256).size == (16, 16)
    assert refusal(tiled(32), most_pixels=1023) == "expected an image of at most 1023 pixels, found 32x32"
    assert "of at most 40000000 pixels, found 40000x40000" in refusal(tiled(40000), most_pixels=40_000_000)


def test_no_program_is_started_for_a_file_within_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow opens what an IPTC record holds as any format, EPS too, for which it starts Ghostscript."""
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: started.append(arguments))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    side = struct.pack(">H", 16)
    fields = {(3, 20): side, (3, 30): side, (3, 60): b"\1\0", (3, 120): b"\5", (8, 10): eps}
    record = b"".join(bytes((28, *tag)) + struct.pack(">H", len(value)) + value for tag, value in fields.items())
    assert Image.open(io.BytesIO(record)).format == "IPTC"
    for data in (record, eps):
        assert "cannot identify image file" in refusal(data)
    assert started == []


def test_formats_limit_what_is_tried(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded("BMP"))
    for source in (encoded("BMP"), tmp_path / "x.png"):
        assert decode(source, "x", False, formats=("PNG", "BMP")).size == (32, 24)
        text = refusal(source, formats=("PNG", "JPEG"))
        assert text == "expected an image that Pillow can decode (PNG, JPEG), found cannot identify image file"
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", formats=("EPS",)).endswith("image file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most_pixels": 0}, "most_pixels: expected a positive number, found 0"),
        ({"most_pixels": 1.5}, "most_pixels: expected a positive number, found 1.5"),
        ({"formats": "PNG"}, "formats: expected names of Pillow's formats, found 'PNG'"),
        ({"formats": ()}, r"formats: expected names of Pillow's formats, found \(\)"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        decode(encoded("PNG"), "x", False, **options)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_is_the_image(file_format: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue", "lime")]
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    frames[0].save(stream, file_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(stream.getvalue())) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    assert decode(stream.getvalue(), "x", False).tobytes() == frames[0].tobytes()


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_cut_files(file_format: str, share: float) -> None:
    data = encoded(file_format)
    assert "that Pillow can decode, found " in refusal(data[: int(share * len(data))])


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("strict", [False, True])
def test_bytes_that_were_changed_give_an_image_or_the_one_kind_of_error(file_format: str, strict: bool) -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = np.frombuffer(encoded(file_format, **({} if file_format == "GIF" else {"exif": exif})), dtype=np.uint8)
    refused = []
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        for _ in range(200):
            changed = data.copy()
            changed[rng.integers(0, min(len(data), 400), 3)] = rng.integers(0, 256, 3)
            try:
                assert decode(changed.tobytes(), "x", False, 1 << 20).mode == "RGB"
            except UnreadableImageError as error:
                refused.append(str(error))
    assert refused
    assert not [message for message in refused if "\n" in message]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>',
        b"<!DOCTYPE html><html><body><img src=x></body></html>",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_image(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.png").write_bytes(data)
    for source in (data, tmp_path / "x.png"):
        assert refusal(source) == "expected an image that Pillow can decode, found cannot identify image file"


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_and_profiles_that_would_unpack_without_end(name: bytes) -> None:
    packed = zlib.compress(bytes(1 << 26))
    between = {b"zTXt": b"\0", b"iTXt": b"\1\0\0\0", b"iCCP": b"\0"}[name]
    data = png(8, 8, chunk(name, b"a\0" + between + packed), pixels=bytes(72))
    assert "found Decompressed data too large" in refusal(data)


def test_many_long_texts_are_refused_or_left_alone() -> None:
    texts = [chunk(b"tEXt", b"k%d\0" % i + b"x" * (1 << 22)) for i in range(20)]
    assert "found Too much memory used in text chunks" in refusal(png(8, 8, *texts, pixels=bytes(72)))
    assert decode(png(8, 8, *texts[:2], pixels=bytes(72)), "x", True).tobytes() == bytes(64)


def test_an_exif_block_as_long_as_can_be() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x9286] = 6, b"x" * 65000
    assert decode(encoded("PNG", exif=exif), "x", False).size == (24, 32)
    assert "found not a TIFF file" in refusal(encoded("PNG", exif=b"Exif\0\0" + b"\xff" * (1 << 20)))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert refusal(tmp_path / "pipe.png") == "expected an image file, found a pipe"
    assert refusal(tmp_path) == "expected an image file, found a folder"
    assert refusal(Path(os.devnull)) == "expected an image file, found a device"
    assert refusal(tmp_path / "none.png").endswith("found No such file or directory")
    assert "null" in refusal(Path("a\0b"))
    (tmp_path / "link.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    assert decode(tmp_path / "link.png", "x", False).size == (32, 24)


def test_no_file_stays_open(tmp_path: Path) -> None:
    """What is refused is closed: with warnings as errors an open file would be told of."""
    (tmp_path / "x.png").write_bytes(png(20000, 20000))
    (tmp_path / "y.png").write_bytes(encoded("PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        refusal(tmp_path / "x.png")
        refusal(tmp_path / "y.png", most_pixels=1)
