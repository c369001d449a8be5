"""CIFAR-10 in its three layouts; pickles that would run code are refused without running it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data_layouts import write_cifar

from pyglow_fast.data import DataConfig, load_data, split
from pyglow_fast.data.prepare import luma


@pytest.mark.parametrize("layout", ["python2", "python3", "bin"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    values, labels = write_cifar(tmp_path, layout)
    data = load_data(DataConfig(f"cifar10:{tmp_path}"))
    assert (len(data), data.image_shape, data.n_bins, data.class_names[:2]) == (
        12,
        (3, 32, 32),
        256,
        ("airplane", "automobile"),
    )
    assert torch.equal(data.batch(torch.arange(12))[0], values)
    assert data.labels is not None
    assert data.labels.tolist() == labels
    assert [side.tolist() for side in split(data, None, 0)] == [list(range(10)), [10, 11]]
    inside = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert load_data(DataConfig(f"cifar10:{inside}")).fingerprint() == data.fingerprint()


def test_gray_bits_padding(tmp_path: Path) -> None:
    values, _ = write_cifar(tmp_path, "bin")
    data = load_data(DataConfig(f"cifar10:{tmp_path}", gray=True, n_bits=5, size=40))
    assert (data.image_shape, data.n_bins) == ((1, 40, 40), 32)
    assert torch.equal(data.batch(torch.arange(12))[0][:, :, 4:36, 4:36], luma(values) >> 3)


class _Evil:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("call", "name"), [(os.system, "posix.system|nt.system"), (eval, "builtins.eval|__builtin__.eval")]
)
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, call: Any, name: str, protocol: int) -> None:
    write_cifar(tmp_path, "python3")
    target = tmp_path / "ran"
    text = f"touch {target}" if call is os.system else f"open({str(target)!r}, 'w')"
    raw = pickle.dumps({"data": _Evil(call, text), "labels": []}, protocol=protocol)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"data_batch_3: expected a pickle of arrays and text alone, found .*{name}"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a pickled dict, found list"),
        ({"labels": [1]}, "expected an array 'data', found NoneType"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "found an array of something else than bytes"),
        ({"data": np.array([{}] * 3072, object), "labels": [1]}, "expected a pickle of arrays and text alone"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [1]}, r"expected 'data' of shape \(N, 3072\)"),
        ({"data": np.asfortranarray(np.zeros((2, 3072), np.uint8)), "labels": [1, 1]}, "found an array of shape"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "expected 2 labels, one an image, found 1"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, r"expected labels in 0\.\.9, found 10\.\.10"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "expected a list 'labels' of whole numbers"),
    ],
)
def test_damaged_pickles(tmp_path: Path, content: Any, message: str) -> None:
    write_cifar(tmp_path, "python3")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=f"test_batch: .*{message}|test_batch: {message}"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))


@pytest.mark.parametrize("raw", [b"", b"\x80\x02", b"hello", b"\x80\x02}U\x01a"])
def test_no_pickle_at_all(tmp_path: Path, raw: bytes) -> None:
    write_cifar(tmp_path, "python3")
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(raw)
    with pytest.raises(ValueError, match="test_batch: expected a pickle of arrays and text alone, found"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))


def test_damaged_records_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cifar10: expected a folder with cifar-10-batches-py or cifar-10-batches-bin"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))
    write_cifar(tmp_path, "bin")
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin: expected whole records of 3073 bytes, found 6145 bytes"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))
    path.unlink()
    with pytest.raises(ValueError, match=r"cifar10: expected the file .*data_batch_2\.bin, found none"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))
