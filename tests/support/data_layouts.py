"""Small data sets in the layouts that the loaders read."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PREFIXES = (("train", 6), ("t10k", 4))


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> np.ndarray[Any, Any]:
    """Write noise; returns its values (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], *((len(mode),) if len(mode) > 1 else ()))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(values).save(path)
    return values


def idx_bytes(values: np.ndarray[Any, Any]) -> bytes:
    """A uint8 array as an IDX file."""
    return struct.pack(f">{1 + values.ndim}I", 0x800 + values.ndim, *values.shape) + values.tobytes()


def write_idx(folder: Path, packed: bool = True) -> tuple[np.ndarray[Any, Any], list[int]]:
    """The four files of MNIST with 6 and 4 images; returns the values (10, 28, 28) and the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    images, labels = [], []
    for prefix, count in PREFIXES:
        values = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        classes = np.arange(count, dtype=np.uint8) % 10
        for content, array in (("images-idx3", values), ("labels-idx1", classes)):
            raw = idx_bytes(array)
            name = f"{prefix}-{content}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
        images.append(values)
        labels += classes.tolist()
    return np.concatenate(images), labels


def python2_batch(values: np.ndarray[Any, Any], labels: Sequence[int]) -> bytes:
    """What Python 2 writes for {"data": array, "labels": list} in protocol 2: text and bytes are one kind of string."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def whole(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + whole(0) + whole(1) + b"\x87R"
    state = b"(" + whole(3) + text(b"|") + b"NNN" + whole(-1) + whole(-1) + whole(0) + b"t" + b"b"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + whole(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = whole(values.shape[0]) + whole(values.shape[1]) + b"\x86"
    filled = array + b"(" + whole(1) + shape + dtype + state + b"\x89" + text(values.tobytes()) + b"tb"
    listed = b"](" + b"".join(whole(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + filled + text(b"labels") + listed + b"u."


def write_cifar(root: Path, layout: str) -> tuple[Tensor, list[int]]:
    """CIFAR-10 with 2 images a file, as "python2", "python3" or "bin"; returns values (12, 3, 32, 32) and labels."""
    folder = root / ("cifar-10-batches-bin" if layout == "bin" else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(2)
    images, labels = [], []
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        values = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        classes = [i, 9 - i]
        if layout == "bin":
            records = [bytes([label]) + row.tobytes() for label, row in zip(classes, values, strict=True)]
            (folder / f"{name}.bin").write_bytes(b"".join(records))
        elif layout == "python2":
            (folder / name).write_bytes(python2_batch(values, classes))
        else:
            (folder / name).write_bytes(pickle.dumps({b"data": values, b"labels": classes}, protocol=2))
        images.append(values)
        labels += classes
    return torch.from_numpy(np.concatenate(images)).reshape(-1, 3, 32, 32), labels


def write_celeba(root: Path, parts: str = "00012") -> None:
    """One image for each digit of ``parts``, which is its part; 000002.jpg and every second one after it smile."""
    folder = root / "celeba"
    names = [f"{i + 1:06}.jpg" for i in range(len(parts))]
    for i, name in enumerate(names):
        picture(folder / "img_align_celeba" / name, i, (18, 22))
    lines = [f"{name} {part}\n" for name, part in zip(names, parts, strict=True)]
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    rows = [f"{name}  {'1' if i % 2 else '-1'} -1\n" for i, name in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling Young\n" + "".join(rows))


def write_lmdb(path: Path, count: int, seed: int = 0, bad: Sequence[int] = ()) -> None:
    """A database of ``count`` encoded images; those in ``bad`` are not images."""
    import io

    import lmdb

    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i in range(count):
            buffer = io.BytesIO()
            values = np.random.default_rng(seed + i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(values).save(buffer, "WEBP" if i % 2 else "JPEG")
            transaction.put(f"{i:040x}".encode(), b"no image" if i in bad else buffer.getvalue())


def write_emoji(root: Path) -> None:
    """Two emoji with skin tones, one of them of two people; two flags that share a picture; one without a file."""
    images = root / "img" / "twitter" / "64"
    tones = {"1F3FB": {"image": "a-1f3fb.png"}, "1F3FF": {"image": "a-1f3ff.png"}}
    mixed = {"1F3FB-1F3FF": {"image": "b-x.png"}}
    entries = [
        {"short_name": "wave", "category": "People", "image": "a.png", "skin_variations": tones},
        {"short_name": "pair", "category": "People", "image": "b.png", "skin_variations": mixed},
        {"short_name": "flag1", "category": "Flags", "image": "f1.png"},
        {"short_name": "flag2", "category": "Flags", "image": "f2.png"},
        {"short_name": "gone", "category": "Lost", "image": "gone.png"},
    ]
    for i, name in enumerate(("a", "a-1f3fb", "a-1f3ff", "b", "b-x")):
        picture(images / f"{name}.png", i, (64, 64), "RGBA")
    for name in ("f1", "f2"):
        picture(images / f"{name}.png", 9, (64, 64), "RGBA")
    (root / "emoji.json").write_text(json.dumps(entries))
