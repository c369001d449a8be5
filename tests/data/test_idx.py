"""MNIST and Fashion-MNIST files: what is read, how it is prepared, and what is wrong with a file."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_layouts import idx_bytes, write_idx

from pyglow_fast.data import DataConfig, load_data, split


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_values_labels_and_the_official_split(tmp_path: Path, name: str, packed: bool) -> None:
    values, labels = write_idx(tmp_path, packed)
    data = load_data(DataConfig(f"{name}:{tmp_path}"))
    assert (len(data), data.image_shape, data.n_bins, len(data.class_names)) == (10, (1, 28, 28), 256, 10)
    assert torch.equal(data.batch(torch.arange(10))[0][:, 0], torch.from_numpy(values))
    assert data.labels is not None
    assert data.labels.tolist() == labels
    train, test = split(data, None, 0)
    assert (train.tolist(), test.tolist()) == (list(range(6)), [6, 7, 8, 9])
    assert split(data, 0.2, 0)[1].tolist() != [8, 9]
    assert len(split(data, 0.2, 0)[1]) == 2
    assert data.subset(train).official is None


def test_the_cache_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path))
    message = r"mnist: expected its files in '.*/mnist' \(run: pyglow-fast data mnist\) or mnist:PATH, found none"
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig("mnist"))
    write_idx(tmp_path / "mnist")
    assert len(load_data(DataConfig("mnist"))) == 10


def test_padding_margin_bits(tmp_path: Path) -> None:
    values, _ = write_idx(tmp_path)
    data = load_data(DataConfig(f"mnist:{tmp_path}", size=32, crop_margin=4, n_bits=3))
    assert (data.image_shape, data.n_bins) == ((1, 32, 32), 8)
    inner = data.batch(torch.tensor([3]))[0][0, 0, 2:30, 2:30]
    assert np.array_equal(inner.numpy(), values[3] >> 5)
    assert {tuple(data.item(0, key).nonzero().min(0).values.tolist()) for key in range(200)} == {
        (0, top, left) for top in range(5) for left in range(5)
    }
    own = load_data(DataConfig(f"mnist:{tmp_path}", crop_margin=4))
    assert own.image_shape == (1, 28, 28)
    assert np.array_equal(own.item(3)[0].numpy(), values[3])


def _head(magic: int, *sizes: int) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes)


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda raw: b"\0\0", "images.*: expected an IDX file, found 2 bytes"),
        (IMAGES, lambda raw: _head(0x801, 6) + b"\0" * 12, r"expected the IDX magic number 0x00000803 .*found 0x000"),
        (IMAGES, lambda raw: raw[:-1], r"expected 4704 bytes for sizes \(6, 28, 28\), found 4703"),
        (IMAGES, lambda raw: raw + b"x", r"expected 4704 bytes for sizes \(6, 28, 28\), found more"),
        (IMAGES, lambda raw: _head(0x803, 1 << 30, 1 << 30, 1 << 30), "expected 1237940039285380274899124224 bytes"),
        (IMAGES, lambda raw: _head(0x803, 0, 28, 28), r"expected at least one value, found sizes \(0, 28, 28\)"),
        (IMAGES, lambda raw: idx_bytes(np.zeros((6, 8, 8), np.uint8)), r"expected images of 28x28, found \(8, 8\)"),
        (LABELS, lambda raw: idx_bytes(np.zeros(5, np.uint8)), "labels.*: expected 6 labels, one an image, found 5"),
        (LABELS, lambda raw: idx_bytes(np.full(6, 10, np.uint8)), r"labels.*: expected labels in 0\.\.9, found 10"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_idx(tmp_path)
    raw = gzip.decompress((tmp_path / name).read_bytes())
    (tmp_path / name).write_bytes(gzip.compress(change(raw)))
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(f"mnist:{tmp_path}"))


@pytest.mark.parametrize("damage", ["cut", "plain"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    write_idx(tmp_path)
    whole = (tmp_path / IMAGES).read_bytes()
    (tmp_path / IMAGES).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"not gzip at all")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: expected a whole IDX file, found"):
        load_data(DataConfig(f"mnist:{tmp_path}"))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mnist: expected an existing folder, found '.*/none'"):
        load_data(DataConfig(f"mnist:{tmp_path}/none"))
    write_idx(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(ValueError, match=r"expected the file train-labels-idx1-ubyte\.gz or train.*, found neither"):
        load_data(DataConfig(f"mnist:{tmp_path}"))
