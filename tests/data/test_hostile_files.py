"""Files and folders that nobody expects: each is read, or refused by its name, and nothing waits or is lost unseen."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data_layouts import picture, write_celeba, write_cifar, write_emoji, write_idx, write_lmdb

from pyglow_fast.data import DataConfig, Images, UnreadableImageError, batches, load_data, split

pytestmark = pytest.mark.full


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """A test that waits for somebody to write into a pipe fails."""

    def late(*args: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder cannot be listed. By a patch, since root may read anywhere."""
    scandir = os.scandir

    def refuse(path: Any = ".") -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.parametrize("source", ["folder", "photos", "imagenet"])
def test_a_folder_that_cannot_be_listed_does_not_vanish(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "train" if source == "imagenet" else tmp_path
    for i, name in enumerate(("cat", "dog", "eel")):
        picture(root / name / "1.png", i)
    if source == "imagenet":
        shutil.copytree(root, tmp_path / "val")
    options: dict[str, Any] = {"scale": 1} if source == "photos" else {}
    config = DataConfig(f"{source}:{tmp_path}", size=8, **options)
    whole = load_data(config)
    if source == "imagenet":
        shutil.rmtree(tmp_path / "val" / "dog")
    locked(root / "dog", monkeypatch)
    with pytest.raises(ValueError, match=r"/dog: expected a folder that can be listed, found Permission denied$"):
        load_data(config)
    skipping = DataConfig(f"{source}:{tmp_path}", size=8, on_unreadable="skip", **options)
    with pytest.warns(UserWarning, match="folders in .* left out: 1; the first: .*/dog: .* found Permission denied$"):
        rest = load_data(skipping)
    lost = len(whole) // 3 if source != "imagenet" else 2
    assert len(rest) == len(whole) - lost
    if whole.labels is not None:
        assert (whole.class_names, rest.class_names) == (("cat", "dog", "eel"), ("cat", "eel"))


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _folder(root: Path) -> Path:
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        picture(root / name)
    return root / "b" / "1.png"


def _imagenet(root: Path) -> Path:
    for part in ("train", "val"):
        _folder(root / part)
    return root / "val" / "b" / "1.png"


def _celeba(root: Path) -> Path:
    write_celeba(root)
    return root / "celeba" / "img_align_celeba" / "000002.jpg"


def _emoji(root: Path) -> Path:
    write_emoji(root)
    return root / "img" / "twitter" / "64" / "a.png"


FILES: dict[str, Callable[[Path], Path]] = {
    "folder": _folder,
    "photos": _folder,
    "imagenet": _imagenet,
    "celeba": _celeba,
    "emoji": _emoji,
}


@pytest.mark.parametrize("source", FILES)
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_pipe_among_the_images(tmp_path: Path, source: str, in_memory: bool) -> None:
    path = FILES[source](tmp_path)
    options: dict[str, Any] = {"scale": 1} if source == "photos" else {"in_memory": in_memory}
    count = len(load_data(DataConfig(f"{source}:{tmp_path}", size=8, **options)))
    assert path.exists()
    _pipe(path)

    def load(on_unreadable: str) -> Images:
        return load_data(DataConfig(f"{source}:{tmp_path}", size=8, on_unreadable=on_unreadable, **options))

    message = f"{path.name}: expected an image file, found a pipe$"
    with pytest.raises(UnreadableImageError, match=message):
        data = load("raise")
        data.batch(torch.arange(len(data)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load("skip")
    assert len(data) in (count, count - 1, count - 4)  # read later, now, and the four tiles of a photo
    assert len(data.batch(torch.arange(len(data)))[0]) == len(data)


def test_a_pipe_in_a_process_that_reads(tmp_path: Path) -> None:
    _pipe(_folder(tmp_path))
    data = load_data(DataConfig(f"folder:{tmp_path}", size=8, in_memory=False))
    plan = [[(0, None)], [(1, None)], [(2, None)]]
    with pytest.raises(UnreadableImageError, match=r"b/1\.png: expected an image file, found a pipe"):
        list(batches(data, plan, workers=1))
    (first, second, third) = batches(data, plan, workers=1, on_unreadable="skip")
    assert [int(batch.indices) for batch in (first, second, third)] == [0, 2, 2]


LISTS = [
    ("celeba:{}", lambda root: write_celeba(root), "celeba/list_attr_celeba.txt", {"attribute": "Smiling"}),
    ("celeba:{}", lambda root: write_celeba(root), "celeba/list_eval_partition.txt", {}),
    ("emoji:{}", write_emoji, "emoji.json", {}),
    ("mnist:{}", lambda root: write_idx(root, packed=False), "train-images-idx3-ubyte", {}),
    ("cifar10:{}", lambda root: write_cifar(root, "python3"), "cifar-10-batches-py/data_batch_2", {}),
    ("lsun:{}", lambda root: write_lmdb(root / "bed_train_lmdb", 2), "bed_train_lmdb/data.mdb", {}),
]


@pytest.mark.parametrize(("name", "write", "path", "options"), LISTS, ids=[path for _, _, path, _ in LISTS])
def test_a_pipe_in_place_of_another_file(
    tmp_path: Path, name: str, write: Callable[[Path], Any], path: str, options: dict[str, Any]
) -> None:
    if name.startswith("lsun"):
        pytest.importorskip("lmdb")
    write(tmp_path)
    _pipe(tmp_path / path)
    with pytest.raises(ValueError, match=r"expected .*, found n(one|either|o file data\.mdb)"):
        load_data(DataConfig(name.format(tmp_path), **options))


def test_lists_that_are_nested_too_deeply(tmp_path: Path) -> None:
    write_emoji(tmp_path)
    (tmp_path / "emoji.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(
        ValueError, match=r"emoji\.json: expected the list of an emoji-datasource package, found Recurs"
    ):
        load_data(DataConfig(f"emoji:{tmp_path}"))


@pytest.mark.parametrize("in_memory", [True, False])
def test_names_that_are_no_text(tmp_path: Path, in_memory: bool) -> None:
    """Any bytes but / and NUL are a name: images are read, split and told apart, and a bad one is named in one line."""
    for i, name in enumerate((b"\xff\xfe", b"a\nb", b"\x1b[31m")):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        for k in range(3):
            picture(tmp_path / "x.png", 3 * i + k)
            (tmp_path / "x.png").rename(tmp_path / os.fsdecode(name) / os.fsdecode(b"%d\xe9\n.png" % k))
    config = DataConfig(f"folder:{tmp_path}", size=8, in_memory=in_memory)
    data = load_data(config)
    assert set(data.class_names) == {"\udcff\udcfe", "a\nb", "\x1b[31m"}
    assert len(data.batch(torch.arange(9))[0]) == 9
    assert sorted(torch.cat(split(data, None, 0)).tolist()) == list(range(9))
    fingerprint = data.fingerprint()
    assert fingerprint == load_data(config).fingerprint()
    bad = tmp_path / "\x1b[31m" / os.fsdecode(b"1\xe9\n.png")
    bad.write_bytes(b"no image")
    with pytest.raises(UnreadableImageError) as caught:
        load_data(config).batch(torch.arange(9))
    assert str(caught.value).startswith(
        f"{tmp_path}/\\x1b[31m/1\\udce9\\n.png: expected an image that Pillow can decode"
    )
    os.rename(bad, tmp_path / "\x1b[31m" / os.fsdecode(b"1\xea\n.png"))
    if not in_memory:
        assert load_data(config).fingerprint() != fingerprint
