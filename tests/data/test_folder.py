"""Folders of image files: what is read, how it is brought to size, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyglow_fast.data import load_folder


def write(path: Path, value: int | tuple[int, ...] = 0, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_values_order_and_recursion(tmp_path: Path) -> None:
    write(tmp_path / "b.png", (10, 20, 30))
    write(tmp_path / "a" / "z.bmp", (1, 2, 3))
    write(tmp_path / ".hidden.png", (99, 99, 99))
    write(tmp_path / ".cache" / "x.png", (99, 99, 99))
    (tmp_path / "notes.txt").write_text("not an image")
    data = load_folder(tmp_path, size=4)
    assert data.pixels.shape == (2, 3, 4, 4)
    assert data.pixels[:, :, 0, 0].tolist() == [[1, 2, 3], [10, 20, 30]]
    assert data.groups == ("a/z.bmp", "b.png")
    assert data.n_bins == 256


def test_an_image_of_the_right_size_is_not_resampled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert torch.equal(load_folder(tmp_path, size=5).pixels[0], torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("shape", [(12, 6), (6, 12)])
def test_the_centre_is_kept(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = Image.new("L", shape, 0)
    left, top = (shape[0] - 6) // 2, (shape[1] - 6) // 2
    image.paste(200, (left, top, left + 6, top + 6))
    image.save(tmp_path / "x.png")
    pixels = load_folder(tmp_path, size=3, gray=True).pixels
    assert pixels.unique().tolist() == [200]


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_n_bits_drops_the_lower_bits(tmp_path: Path, n_bits: int) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    data = load_folder(tmp_path, size=16, gray=True, n_bits=n_bits)
    assert data.n_bins == 2**n_bits
    assert data.pixels.flatten().tolist() == [value // 2 ** (8 - n_bits) for value in range(256)]


def test_gray_is_luma(tmp_path: Path) -> None:
    write(tmp_path / "x.png", (255, 0, 0))
    assert load_folder(tmp_path, size=4, gray=True).pixels.unique().tolist() == [76]  # 0.299 * 255


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    write(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    write(tmp_path / "half.png", (0, 0, 0, 128), mode="RGBA")
    pixels = load_folder(tmp_path, size=4).pixels
    assert pixels[0].unique().tolist() == [255]
    assert pixels[1].unique().tolist() == [127]


def test_16_bit_samples_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16)).save(tmp_path / "x.png")
    assert load_folder(tmp_path, size=4, gray=True).pixels.unique().tolist() == [0x80]


def test_exif_turns_the_image_upright(tmp_path: Path) -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image.save(tmp_path / "x.png", exif=exif)
    pixels = load_folder(tmp_path, size=8, gray=True).pixels[0, 0]
    assert pixels[:4].unique().tolist() == [0]
    assert pixels[4:].unique().tolist() == [255]


def test_subfolders_are_classes_and_can_be_groups(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/1.png", "cat/more/2.png"):
        write(tmp_path / name)
    data = load_folder(tmp_path, size=4, split_by="folder")
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    assert data.groups == ("cat", "cat/more", "dog")
    write(tmp_path / "stray.png")
    assert load_folder(tmp_path, size=4).labels is None


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "good.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "bad.png").write_bytes(b"this is no image")
    with pytest.raises(
        ValueError, match=r"sub/bad\.png: expected an image that Pillow can decode, found cannot identify"
    ):
        load_folder(tmp_path, size=4)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"cut\.jpg: expected an image that Pillow can decode, found image file is truncated"
    ):
        load_folder(tmp_path, size=4)


def test_samples_without_a_range_are_named(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=r"x\.tiff: expected an image that Pillow can decode, found 'F' samples"):
        load_folder(tmp_path, size=4)


def test_postscript_is_never_run(tmp_path: Path) -> None:
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ValueError, match=r"x\.png: expected an image that Pillow can decode, found cannot identify"):
        load_folder(tmp_path, size=4)


def test_a_small_image_is_named(tmp_path: Path) -> None:
    write(tmp_path / "small.png", size=(40, 20))
    with pytest.raises(ValueError, match=r"small\.png: expected an image of at least 32x32, found 40x20"):
        load_folder(tmp_path, size=32)


def test_wrong_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder: expected an existing folder, found '.*/none'"):
        load_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"folder: expected an existing folder, found '.*/file' \(a file\)"):
        load_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"folder: expected a folder with images that Pillow reads, found none in '.*/empty'"
    ):
        load_folder(tmp_path / "empty")


@pytest.mark.parametrize(
    ("option", "message"),
    [({"size": 0}, "size: expected a positive"), ({"n_bits": 9}, "n_bits: expected"), ({"split_by": "x"}, "split_by:")],
)
def test_wrong_options(tmp_path: Path, option: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path, **option)  # type: ignore[arg-type]
