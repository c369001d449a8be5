"""torchvision reads the same out of the same files, as far as it reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_layouts import picture, write_celeba, write_cifar, write_idx, write_lmdb
from torch import Tensor

from pyglow_fast.data import DataConfig, Images, load_data

datasets = pytest.importorskip("torchvision.datasets")


def ours(name: str, part: int, **options: Any) -> tuple[Images, Tensor]:
    """The images of one side of the official split, and their labels."""
    data = load_data(DataConfig(name, **options))
    assert data.official is not None
    assert data.labels is not None
    side = data.subset(data.official[part])
    assert side.labels is not None
    return side, side.labels


def tensors(theirs: Any) -> Tensor:
    """The PIL images of a torchvision Dataset as uint8 (N, C, H, W)."""
    pil_to_tensor = pytest.importorskip("torchvision.transforms.functional").pil_to_tensor
    return torch.stack([pil_to_tensor(image) for image, _ in theirs])


def agree(images: Images, labels: Tensor, theirs: Any) -> None:
    assert torch.equal(images.batch(torch.arange(len(images)))[0], tensors(theirs))
    assert labels.tolist() == [int(label) for _, label in theirs]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(("dataset", "name"), [("MNIST", "mnist"), ("FashionMNIST", "fashion-mnist")])
def test_mnist(tmp_path: Path, dataset: str, name: str) -> None:
    raw = tmp_path / dataset / "raw"
    write_idx(raw, packed=False)
    for part, train in enumerate((True, False)):
        agree(*ours(f"{name}:{raw}", part), getattr(datasets, dataset)(tmp_path, train))
    assert load_data(DataConfig(f"{name}:{raw}")).class_names == tuple(
        word.split(" - ")[0] for word in getattr(datasets, dataset).classes
    )


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "python2")  # as the authors wrote them
    folder = tmp_path / "cifar-10-batches-py"
    for known in ("train_list", "test_list"):
        listed = [[name, md5(folder / name)] for name, _ in getattr(datasets.CIFAR10, known)]
        monkeypatch.setattr(datasets.CIFAR10, known, listed)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    for part, train in enumerate((True, False)):
        agree(*ours(f"cifar10:{tmp_path}", part), datasets.CIFAR10(tmp_path, train))


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_celeba(tmp_path, "000122")  # it cannot read a part of one image
    monkeypatch.setattr(datasets.CelebA, "_check_integrity", lambda self: True)  # a MD5 of each list of all images
    names = [path.name for path in sorted((tmp_path / "celeba" / "img_align_celeba").iterdir())]
    rows = "".join(f"{name} 1\n" for name in names)
    (tmp_path / "celeba" / "identity_CelebA.txt").write_text(rows)
    for file in ("list_bbox_celeba.txt", "list_landmarks_align_celeba.txt"):
        (tmp_path / "celeba" / file).write_text(f"{len(names)}\nx\n{rows}")
    for part, split in enumerate(("train", "test")):
        theirs = datasets.CelebA(tmp_path, split)
        _, labels = ours(f"celeba:{tmp_path}", part, size=16, attribute="Young")
        column = theirs.attr_names.index("Young")
        assert labels.tolist() == theirs.attr[:, column].tolist()


def test_imagenet(tmp_path: Path) -> None:
    for i, name in enumerate(("train/n2/a.png", "train/n1/c.png", "train/n1/b.png", "val/n2/d.png", "val/n1/e.png")):
        picture(tmp_path / name, i, (8, 8))
    for part, folder in enumerate(("train", "val")):
        agree(*ours(f"imagenet:{tmp_path}", part, size=8), datasets.ImageFolder(str(tmp_path / folder)))


def test_lsun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmdb")
    monkeypatch.chdir(tmp_path)  # where it leaves pickles
    for i, name in enumerate(("bedroom_train", "tower_train")):
        write_lmdb(tmp_path / f"{name}_lmdb", 3, 10 * i)
    theirs = datasets.LSUN(str(tmp_path), ["bedroom_train", "tower_train"])
    labels = [label for _, label in theirs]
    for opened in theirs.dbs:  # a process can open a database but once
        opened.env.close()
    data = load_data(DataConfig(f"lsun:{tmp_path}", size=20))
    assert data.labels is not None
    assert data.labels.tolist() == labels
