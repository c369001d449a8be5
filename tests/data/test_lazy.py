"""Images that are read later: subsets, fingerprints, what fits in memory, and what cannot be read."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_layouts import picture

from pyglow_fast.data import (
    DataConfig,
    Images,
    ImageSet,
    LazyImages,
    UnreadableImageError,
    load_data,
    load_folder,
    measure_yardsticks,
    split,
)


def folder(root: Path, count: int = 6, side: int = 16) -> Path:
    for i in range(count):
        picture(root / "ab"[i % 2] / f"{i}.png", i, (side, side))
    return root


def later(root: Path, **options: object) -> LazyImages:
    data = load_data(DataConfig(f"folder:{root}", in_memory=False, size=16, **options))  # type: ignore[arg-type]
    assert isinstance(data, LazyImages)
    return data


def test_what_fits_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    assert isinstance(load_folder(tmp_path, 16), ImageSet)
    monkeypatch.setattr("pyglow_fast.data.lazy.MEMORY_LIMIT", 6 * 3 * 16 * 16 - 1)
    assert isinstance(load_folder(tmp_path, 16), LazyImages)
    assert isinstance(load_folder(tmp_path, 16, in_memory=True), ImageSet)
    assert isinstance(load_folder(tmp_path, 16, gray=True), ImageSet)


def test_subsets_of_subsets(tmp_path: Path) -> None:
    data = later(folder(tmp_path), n_bits=5, flip=True)
    part = data.subset([5, 1, 3]).subset(torch.tensor([2, 0]))
    assert torch.equal(part.batch(torch.tensor([0, 1]))[0], data.batch(torch.tensor([3, 5]))[0])
    assert torch.equal(part.item(1, 7), data.item(5, 7))
    assert data.labels is not None
    assert part.labels is not None
    assert part.labels.tolist() == data.labels[[3, 5]].tolist()
    assert part.groups == (data.groups[3], data.groups[5])
    assert (len(part), part.n_dims, part.n_bins) == (2, 768, 32)


def test_the_random_split_is_that_of_the_set_in_memory(tmp_path: Path) -> None:
    folder(tmp_path)
    now: Images = load_folder(tmp_path, 16)
    assert [side.tolist() for side in split(now, 0.4, 3)] == [side.tolist() for side in split(later(tmp_path), 0.4, 3)]
    assert len(split(later(tmp_path), None, 3)[1]) == 1


def test_the_fingerprint_sees_names_sizes_and_settings(tmp_path: Path) -> None:
    root = folder(tmp_path / "one")
    base = later(root)
    moved = folder(tmp_path / "two")
    assert later(moved).fingerprint() == base.fingerprint()
    others = [
        later(root, gray=True),
        later(root, n_bits=7),
        later(root, flip=True),
        later(root, crop_margin=0, split_by="folder"),
        base.subset(range(5)),
        base.subset([1, 0, 2, 3, 4, 5]),
    ]
    os.rename(moved / "a" / "0.png", moved / "a" / "00.png")
    others.append(later(moved))
    with (root / "a" / "2.png").open("ab") as file:
        file.write(b"x")
    others.append(later(root))
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)


def test_it_can_be_pickled(tmp_path: Path) -> None:
    data = later(folder(tmp_path), crop_margin=0)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.item(4), data.item(4))
    assert again.fingerprint() == data.fingerprint()


def test_unreadable_files(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "b" / "3.png").write_bytes(b"no image")
    data = later(tmp_path)
    at = data.groups.index("b/3.png")
    with pytest.raises(UnreadableImageError, match=r"b/3\.png: expected an image that Pillow can decode"):
        data.item(at)
    with pytest.raises(UnreadableImageError, match=r"b/3\.png"):
        data.batch(torch.tensor([0, at]))
    pixels, labels = later(tmp_path, on_unreadable="skip").batch(torch.tensor([0, at]))
    assert torch.equal(pixels[1], data.item(at + 1))
    assert data.labels is not None
    assert labels is not None
    assert labels.tolist() == data.labels[[0, at + 1]].tolist()
    text = r"1 of 6 images of folder:.* could not be read and were left out; the first: .*b/3\.png"
    with pytest.warns(UserWarning, match=text) as warnings:
        kept = load_folder(tmp_path, 16, on_unreadable="skip")
    assert len(warnings) == 1
    assert len(kept) == 5
    assert "b/3.png" not in kept.groups
    with pytest.raises(ValueError, match=r"b/3\.png"):
        load_folder(tmp_path, 16)


def test_skipping_keeps_the_official_split(tmp_path: Path) -> None:
    for i, name in enumerate(("train/x/0.png", "train/x/1.png", "train/x/2.png", "val/x/3.png", "val/x/4.png")):
        picture(tmp_path / name, i)
    for name in ("train/x/1.png", "val/x/3.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="2 of 5 images"):
        data = load_data(DataConfig(f"imagenet:{tmp_path}", size=16, on_unreadable="skip"))
    assert [side.tolist() for side in split(data, None, 0)] == [[0, 1], [2]]
    (tmp_path / "val/x/4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="data: expected images that can be read in both splits of imagenet"):
        load_data(DataConfig(f"imagenet:{tmp_path}", size=16, on_unreadable="skip"))


def test_nothing_readable(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"data: expected at least one image that can be read in .*, found none: .*0\.png"
    ):
        load_folder(tmp_path, 16, on_unreadable="skip")
    with pytest.raises(ValueError, match=r"data: expected at least one image that can be read in .*1\.png"):
        later(tmp_path, on_unreadable="skip").batch(torch.tensor([1]))


def test_yardsticks_read_some_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, 8)
    now, lazy = load_folder(tmp_path, 16), later(tmp_path)
    assert measure_yardsticks(now, now) == measure_yardsticks(lazy, lazy)
    monkeypatch.setattr("pyglow_fast.data.yardsticks.READ_MAX_IMAGES", 3)
    histogram, png = measure_yardsticks(lazy, lazy.subset(range(4)))
    assert (histogram.images, png.images) == (3, 3)
    assert "fitted on 3 of 8 training images, measured on 3 of 4" in histogram.how
    assert "3 of 4 tiled images" in png.how
    chosen = now.subset([0, 2, 5]), now.subset([0, 1, 2])
    expected = measure_yardsticks(*chosen)
    assert [item.bits_per_dim for item in (histogram, png)] == [item.bits_per_dim for item in expected]


def test_a_margin_is_scaled_to_and_cut(tmp_path: Path) -> None:
    values = picture(tmp_path / "x.png", 0, (20, 20))
    picture(tmp_path / "y.png", 1, (20, 20))
    for in_memory in (True, False):
        data = load_folder(tmp_path, 16, crop_margin=4, in_memory=in_memory)
        assert data.image_shape == (3, 16, 16)
        assert np.array_equal(data.item(0).permute(1, 2, 0).numpy(), values[2:18, 2:18])
    with pytest.raises(ValueError, match=r"x\.png: expected an image of at least 24x24, found 20x20"):
        load_folder(tmp_path, 16, crop_margin=8)
