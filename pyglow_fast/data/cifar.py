"""Reads CIFAR-10 as its authors publish it: Python pickles, by an unpickler that runs nothing, or the binary files.

torchvision's own class reads them with ``pickle.load``, which runs whatever code a file names, after a look at their
MD5; and it does not read the binary files.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast.data.folder import check_folder
from pyglow_fast.data.idx import train_first
from pyglow_fast.data.image_set import ImageSet
from pyglow_fast.data.prepare import Preparation

SIDE = 32
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LAYOUTS = {"cifar-10-batches-py": "", "cifar-10-batches-bin": ".bin"}  # folder and ending of its files
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
BATCHES = (*_TRAIN, "test_batch")
_VALUES = 3 * SIDE * SIDE


# What a pickle may name is replaced by these: no code of numpy, let alone of the file's choice, sees what is in it.
class _Dtype:
    def __init__(self, code: str, *rest: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Takes byte order and the like, which bytes have not."""


class _NdArray:
    shape: tuple[int, ...] = ()
    values: bytes = b""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, values = state
        values = values.encode("latin-1") if isinstance(values, str) else values
        if not (isinstance(dtype, _Dtype) and dtype.code in ("u1", "|u1") and isinstance(values, bytes)):
            raise pickle.UnpicklingError("an array of something else than bytes")
        if fortran or math.prod(shape) != len(values):
            raise pickle.UnpicklingError(f"an array of shape {shape} with {len(values)} bytes")
        self.shape, self.values = tuple(shape), values


def _reconstruct(*args: Any) -> _NdArray:
    return _NdArray()


def _encode(text: str, encoding: str = "latin-1") -> bytes:
    return text.encode("latin-1")  # how Python 3 writes bytes in protocol 2; no other encoding is used for them


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _NdArray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin-1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}, which no such file needs")
        return _ALLOWED[module, name]


def _pickled(path: Path) -> dict[str, Any]:
    """Reads the dict in a pickle file, its text keys as str.

    Raises:
        ValueError: it is no pickle of a dict, or names anything but arrays; the message names the file.
    """
    try:
        with path.open("rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(visible(f"{path}: expected a pickle of arrays and text alone, found {error}")) from error
    expect(isinstance(found, dict), str(path), "a pickled dict", type(found).__name__)
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in found.items()}


def _python_batch(path: Path) -> tuple[Tensor, Tensor]:
    """(values uint8 (N, 3072), labels (N,)) of a pickle file."""
    found = _pickled(path)
    data, labels = found.get("data"), found.get("labels")
    if not isinstance(data, _NdArray):
        raise ValueError(visible(f"{path}: expected an array 'data', found {type(data).__name__}"))
    whole = len(data.shape) == 2 and data.shape[1] == _VALUES and data.shape[0] > 0
    expect(whole, str(path), f"'data' of shape (N, {_VALUES})", data.shape)
    if not (isinstance(labels, list) and all(isinstance(label, int) for label in labels)):
        own = type(labels).__name__
        raise ValueError(visible(f"{path}: expected a list 'labels' of whole numbers, found {own}"))
    values = torch.frombuffer(bytearray(data.values), dtype=torch.uint8).reshape(data.shape)
    return values, torch.tensor(labels, dtype=torch.int64)


def _binary_batch(path: Path) -> tuple[Tensor, Tensor]:
    """(values uint8 (N, 3072), labels (N,)) of a file of records: a label, then the values."""
    raw = bytearray(path.read_bytes())
    whole = len(raw) > 0 and len(raw) % (1 + _VALUES) == 0
    expect(whole, str(path), f"whole records of {1 + _VALUES} bytes", f"{len(raw)} bytes")
    records = torch.frombuffer(raw, dtype=torch.uint8).reshape(-1, 1 + _VALUES)
    return records[:, 1:], records[:, 0].long()


def _layout(root: Path) -> tuple[Path, str]:
    """The folder with the files, and their ending."""
    for name, ending in LAYOUTS.items():
        for folder in (root / name, root):
            if (folder / f"{_TRAIN[0]}{ending}").is_file():
                return folder, ending
    raise ValueError(f"cifar10: expected a folder with {' or '.join(LAYOUTS)}, found neither in {str(root)!r}")


def load_cifar10(root: Path, preparation: Preparation) -> ImageSet:
    """Loads CIFAR-10 from ``cifar-10-batches-py`` or ``cifar-10-batches-bin``, with the official split.

    Args:
        root: that folder, or the one it lies in.
        preparation: size (32 or more: padded with zeros), gray, n_bits, crop_margin and flip.

    Raises:
        ValueError: a file is missing, damaged, or holds what such a file never does.
    """
    check_folder(root, "cifar10")
    folder, ending = _layout(root)
    parts = []
    for name in BATCHES:
        path = folder / f"{name}{ending}"
        expect(path.is_file(), "cifar10", f"the file {path}", "none")
        values, labels = _binary_batch(path) if ending else _python_batch(path)
        expect(len(labels) == len(values), str(path), f"{len(values)} labels, one an image", len(labels))
        low, high = int(labels.min()), int(labels.max())
        expect(low >= 0 and high < len(CLASS_NAMES), str(path), "labels in 0..9", f"{low}..{high}")
        parts.append((values, labels))
    values = torch.cat([part[0] for part in parts]).reshape(-1, 3, SIDE, SIDE)
    labels = torch.cat([part[1] for part in parts])
    pixels = preparation.to_pixels(preparation.fixed_size(values, "cifar10"))
    official = train_first(len(values) - len(parts[-1][0]), len(values))
    return ImageSet("cifar10", pixels, preparation.n_bins, labels, CLASS_NAMES, (), official, preparation.augmentation)
