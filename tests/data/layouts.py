"""Small data sets in the layouts that the sources read."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> np.ndarray[Any, Any]:
    """Write noise; returns its values (H, W, C)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], *((len(mode),) if len(mode) > 1 else ()))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(values).save(path)
    return values


def write_idx(folder: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """The four files of MNIST with 6 and 4 images; returns the values (10, 28, 28) and the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(1).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    labels = np.array([*range(6), *range(4)], dtype=np.uint8)
    for prefix, part in (("train", slice(6)), ("t10k", slice(6, 10))):
        for content, array in (("images-idx3", values[part]), ("labels-idx1", labels[part])):
            head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / f"{prefix}-{content}-ubyte").write_bytes(head + array.tobytes())
    return values, labels.tolist()


def write_cifar(root: Path) -> tuple[np.ndarray[Any, Any], list[int]]:
    """CIFAR-10 with 2 images a file; returns values (12, 3, 32, 32) and labels."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    values = np.random.default_rng(2).integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": values[i], "labels": [i, 9 - i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {i}" for i in range(10)]}))
    return values.reshape(12, 3, 32, 32), [label for i in range(6) for label in (i, 9 - i)]


def write_celeba(root: Path, parts: str = "0001122") -> None:
    """An image for each digit of ``parts``, its part, two of each or more; every second one smiles."""
    folder = root / "celeba"
    names = [f"{i + 1:06}.jpg" for i in range(len(parts))]
    for i, name in enumerate(names):
        picture(folder / "img_align_celeba" / name, i, (18, 22))
    rows = [f"{name} {part}\n" for name, part in zip(names, parts, strict=True)]
    for file in ("list_eval_partition.txt", "identity_CelebA.txt"):
        (folder / file).write_text("".join(rows))
    for file in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (folder / file).write_text(f"{len(names)}\nx\n" + "".join(rows))
    rows = [f"{name}  {'1' if i % 2 else '-1'} -1\n" for i, name in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling Young\n" + "".join(rows))


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
    for i, name in enumerate(("a", "a-1f3fb", "a-1f3ff", "b", "b-x", "f1", "f2")):
        picture(images / f"{name}.png", min(i, 5), (64, 64), "RGBA")
    (root / "emoji.json").write_text(json.dumps(entries))
