"""Each source, from small files in its layout: what is read, and what is refused by its name."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.layouts import picture, write_celeba, write_cifar, write_emoji, write_idx
from PIL import Image

from pyglow_fast.data import DataConfig, Images, ImageSet, LazyImages, MissingExtraError, load_data, load_digits, split


@pytest.fixture(autouse=True)
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision take small files for CIFAR-10 and CelebA, whose MD5 it knows."""
    for module in ("cifar", "celeba"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


def load(name: str, **options: Any) -> ImageSet:
    data = load_data(DataConfig(name, **options))
    assert isinstance(data, ImageSet)
    return data


def both(name: str, **options: Any) -> ImageSet:
    """The source read at once; it shows the same as read later."""
    now, later = (load_data(DataConfig(name, in_memory=kept, **options)) for kept in (True, False))
    assert isinstance(now, ImageSet)
    assert isinstance(later, LazyImages)
    assert torch.equal(now.batch(torch.arange(len(now)))[0], later.batch(torch.arange(len(now)))[0])
    assert all(torch.equal(now.item(0, key), later.item(0, key)) for key in range(5))
    for what in ("name", "class_names", "groups", "image_shape", "n_bins"):
        assert getattr(now, what) == getattr(later, what)
    assert [side.tolist() for side in split(now, None, 0)] == [side.tolist() for side in split(later, None, 0)]
    assert torch.equal(pickle.loads(pickle.dumps(later)).item(1), now.item(1))
    return now


def official(data: Images) -> list[list[int]]:
    return [side.tolist() for side in split(data, None, 0)]


def test_digits() -> None:
    data, padded = load("digits"), load("digits", size=16, crop_margin=2, flip=True)
    assert (len(data), data.image_shape, data.n_bins) == (1797, (1, 8, 8), 17)
    assert data.class_names == tuple("0123456789")
    assert data.labels.tolist()[:10] == list(range(10))
    assert data.pixels[0, 0, 1].tolist() == [0, 0, 13, 15, 10, 15, 5, 0]  # the second row of the first, a zero
    assert padded.image_shape == (1, 16, 16)
    assert torch.equal(padded.batch(torch.arange(9))[0][:, :, 4:12, 4:12], data.pixels[:9])
    assert data.fingerprint() == "2c8f13fc17f5b3b11c4842a5d29114b6" != padded.fingerprint()


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_mnist(tmp_path: Path, below: str) -> None:
    values, labels = write_idx(tmp_path / below)
    data, padded = load(f"mnist:{tmp_path}"), load(f"mnist:{tmp_path}", size=32, n_bits=3)
    assert np.array_equal(data.pixels[:, 0].numpy(), values)
    assert (data.labels.tolist(), data.class_names) == (labels, tuple("0123456789"))
    assert official(data) == [list(range(6)), [6, 7, 8, 9]]
    assert np.array_equal(padded.pixels[:, 0, 2:30, 2:30].numpy(), values >> 5)
    assert int(padded.pixels.int().sum()) == int((values >> 5).sum())


def test_cifar10(tmp_path: Path) -> None:
    values, labels = write_cifar(tmp_path)
    for path in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load(f"cifar10:{path}")
        assert np.array_equal(data.pixels.numpy(), values)
        assert (data.labels.tolist(), data.class_names[9]) == (labels, "thing 9")
        assert official(data) == [list(range(10)), [10, 11]]
    grey = np.asarray(Image.fromarray(values[3].transpose(1, 2, 0)).convert("L"))
    assert np.array_equal(load(f"cifar10:{tmp_path}", gray=True).pixels[3, 0].numpy(), grey)


def test_celeba(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    data = both(f"celeba:{tmp_path}", size=16, attribute="Smiling", crop_margin=2, flip=True)
    assert (len(data), data.image_shape, data.class_names) == (7, (3, 16, 16), ("not Smiling", "Smiling"))
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert official(data) == [[0, 1, 2], [5, 6]]
    plain = load(f"celeba:{tmp_path / 'celeba'}", size=16)
    assert plain.labels is None
    assert plain.attributes.names == ("Smiling", "Young")
    assert plain.subset([1, 2]).attributes.has.tolist() == [[True, False], [False, False]]  # type: ignore[union-attr]


def test_imagenet(tmp_path: Path) -> None:
    for i, name in enumerate(("train/n2/a.JPEG", "train/n1/b.JPEG", "train/n1/c.JPEG", "val/n2/d.JPEG")):
        picture(tmp_path / name, i, (20, 16))
    data = both(f"imagenet:{tmp_path}", size=8, n_bits=5)
    assert (data.class_names, data.labels.tolist()) == (("n1", "n2"), [0, 0, 1, 1])
    assert official(data) == [[0, 1, 2], [3]]
    picture(tmp_path / "val/n3/e.JPEG")
    with pytest.raises(ValueError, match="imagenet: expected only classes of train in val, found n3"):
        load(f"imagenet:{tmp_path}")


@pytest.mark.parametrize("name", ["emoji", "emoji-google"])
def test_emoji(tmp_path: Path, name: str) -> None:
    write_emoji(tmp_path)
    data = both(f"{name}:{tmp_path}", size=60, crop_margin=4)
    assert (data.name, len(data), data.image_shape, data.class_names) == (name, 7, (3, 60, 60), ("Flags", "People"))
    assert data.labels.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert data.groups == ("wave", "wave", "wave", "pair", "pair", "flag1", "flag1")  # the flags share a picture
    names, has = data.attributes
    assert names == tuple(f"skin tone {tone}" for tone in ("light", "medium-light", "medium", "medium-dark", "dark"))
    assert has.nonzero().tolist() == [[1, 0], [2, 4]]
    path = tmp_path / "img" / "twitter" / "64" / "a.png"
    white = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), Image.open(path)).convert("RGB")
    assert np.array_equal(data.pixels[0].permute(1, 2, 0).numpy(), np.asarray(white))


def test_photos(tmp_path: Path) -> None:
    first = picture(tmp_path / "a.png", 0, (75, 50))
    picture(tmp_path / "b.png", 1, (32, 32))
    picture(tmp_path / "waves-midnight.jpg", 2, (64, 64))  # a drawing
    data = load(f"photos:{tmp_path}", size=14, crop_margin=2, scale=2)
    assert (data.image_shape, data.labels, data.groups) == ((3, 14, 14), None, ("a.png", "a.png", "b.png"))
    shrunk = np.asarray(Image.fromarray(first[:50, :74]).reduce(2))
    assert np.array_equal(data.pixels[1].permute(1, 2, 0).numpy(), shrunk[:16, 16:32])
    plain = load(f"photos:{tmp_path}", size=16, scale=1, gray=True, n_bits=4)
    assert plain.groups == ("a.png",) * 12 + ("b.png",) * 4
    grey = np.asarray(Image.fromarray(first).convert("L")) >> 4
    assert np.array_equal(plain.pixels[5, 0].numpy(), grey[16:32, 16:32])


def test_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("dog/1.png", "cat/1.bmp", "cat/more/2.png", ".hidden.png", ".cache/x.png")):
        picture(tmp_path / name, i, (4, 4))
    (tmp_path / "notes.txt").write_text("not an image")
    data = both(f"folder:{tmp_path}", size=4, split_by="folder")
    assert (data.class_names, data.labels.tolist()) == (("cat", "dog"), [0, 0, 1])
    assert data.groups == ("cat", "cat/more", "dog")
    picture(tmp_path / "stray.png")
    stray = load(f"folder:{tmp_path}", size=4)
    assert (stray.labels, stray.groups[0]) == (None, "cat/1.bmp")


REFUSALS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a file": (lambda at: (at / "x").touch(), "folder:{}/x", r"folder: expected an existing folder, .*x' \(a file\)"),
    "no mnist": (lambda at: None, "mnist:{}", "mnist: expected a whole copy that torchvision reads in '.*', found"),
    "no class": (
        lambda at: picture(at / "train" / "x.png"),
        "imagenet:{}",
        "imagenet: expected a whole copy that torchvision reads in '.*train', found Couldn't find any class folder",
    ),
    "no list": (lambda at: None, "emoji:{}", "emoji: expected the file .*emoji.json, found none"),
    "a wrong list": (
        lambda at: (write_emoji(at), (at / "emoji.json").write_text('[{"image": "a.png"}]')),
        "emoji:{}",
        "emoji.json: expected the list of an emoji-datasource package, found KeyError",
    ),
    "a small photo": (
        lambda at: picture(at / "a.png", 0, (75, 50)),
        "photos:{}",
        r"a\.png: expected an image of at least 128x128, found 75x50",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_source_and_what_is_missing(case: str, tmp_path: Path) -> None:
    write, name, message = REFUSALS[case]
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_data(DataConfig(name.format(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_copy_of_cifar_that_was_changed_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    write_cifar(tmp_path)
    with pytest.raises(ValueError, match=r"cifar10: expected a whole copy .* found Dataset not found or corrupted$"):
        load_data(DataConfig(f"cifar10:{tmp_path}"))


def test_what_is_missing_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # None makes the import fail
    with pytest.raises(MissingExtraError, match=r'scikit-learn is needed .*pip install "pyglow-fast\[train\]"'):
        load_digits()
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"mnist: expected its files in '.*mnist' \(run: pyglow-fast data mnist\) or"):
        load_data(DataConfig("mnist"))
