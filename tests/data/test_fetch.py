"""Fetching from a server on this machine: whole, checked, or refused with one line."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data.layouts import picture

from pyglow_fast.data import FETCHABLE, FetchError, data_folder, fetch


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address it is served at; the cache is empty."""
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()


def offer(monkeypatch: pytest.MonkeyPatch, name: str, address: str, file: Path) -> None:
    """Make a file the package of a data set."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    changed = replace(FETCHABLE[name], origin=f"{address}/{file.name}", sha256=digest)
    monkeypatch.setitem(FETCHABLE, name, changed)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_package_of_npm(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that was changed is never opened."""
    package = served[0] / "emoji.tgz"
    with tarfile.open(package, "w:gz") as tar:
        for name in ("package/emoji.json", "package/img/twitter/64/a.png", "package/img/twitter/32/a.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    offer(monkeypatch, "emoji", served[1], package)
    assert fetch("emoji", tmp_path / "own") == (tmp_path / "own", False)
    assert fetch("emoji", tmp_path / "own") == (tmp_path / "own", True)
    assert names(tmp_path / "own") == ["emoji.json", "img/twitter/64/a.png"]
    package.write_bytes(package.read_bytes() + b"more")
    with pytest.raises(FetchError, match=r"^emoji could not be fetched: .*emoji.tgz: .*invalid hash.*emoji:PATH$"):
        fetch("emoji")
    assert names(data_folder()) == []


def debian_package(place: Path, folder: Path) -> Path:
    """x.deb in the folder, with one picture in it."""
    picture(place / "deb" / "usr" / "share" / "a.jpg")
    (place / "deb" / "DEBIAN").mkdir()
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (place / "deb" / "DEBIAN" / "control").write_text(control)
    command = ["dpkg-deb", "--root-owner-group", "--build", str(place / "deb"), str(folder / "x.deb")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "x.deb"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")
@pytest.mark.parametrize(("answers", "whole"), [(True, True), (False, True), (False, False)])
def test_a_package_of_debian(
    answers: bool, whole: bool, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """apt-get (a stand-in) fetches the package if its server does not answer; a changed one is refused by hash."""
    package = debian_package(tmp_path, served[0])
    offer(monkeypatch, "photos", served[1] if answers else "http://127.0.0.1:9", package)
    package.write_bytes(package.read_bytes() + (b"" if whole else b"more"))
    script = tmp_path / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\ntest "$1" = download && cp {package} .\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    if whole:
        fetch("photos")
        assert names(data_folder() / "photos") == ["a.jpg"]
    else:
        with pytest.raises(FetchError, match=r"^photos could not be fetched: http://127.0.0.1:9/x.deb"):
            fetch("photos")


def test_wrong_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data: expected one of mnist, .* celeba, found 'imagenet'"):
        fetch("imagenet")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="to: expected a folder, found a file"):
        fetch("emoji", tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match="expected the files of emoji or an empty folder, found others"):
        fetch("emoji", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
