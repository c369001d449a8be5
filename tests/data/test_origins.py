"""Where data sets come from: mirrors and settings, torchvision, pip, and hosts that fail. All servers are local."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import pytest
from support.data_layouts import write_cifar, write_idx
from support.file_server import FileServer, closed_address, file_server

from pyglow_fast.data import origins
from pyglow_fast.data.origins import (
    NPM,
    NpmPackage,
    Origin,
    TorchvisionArchives,
    TorchvisionFiles,
    UnavailableError,
    npm_registry,
)


def tarball(files: Mapping[str, bytes], packed: Literal["gz", "xz"] = "gz") -> bytes:
    """A .tar.gz or .tar.xz."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz" if packed == "gz" else "w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without settings and programs; no proxy stands before local servers."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if name.lower().startswith("npm_config") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("PYGLOW_DEBIAN_MIRROR", raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # keeps the proxies of the first call in a process
    monkeypatch.setattr(origins, "PATIENCE", 5.0)
    return tmp_path


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def collected(origin: Origin, place: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, bytes]:
    """What an origin gives."""
    work, ready = place / "work", place / "ready"
    work.mkdir()
    origin.collect(work, ready, wanted)
    return {path.relative_to(ready).as_posix(): path.read_bytes() for path in ready.rglob("*") if path.is_file()}


def test_the_registry_of_npm(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert npm_registry() == NPM == "https://registry.npmjs.org"
    (settings / ".npmrc").write_text("fund = false\n@mine:registry=https://scoped.example\n")
    assert npm_registry() == NPM
    (settings / ".npmrc").write_text('cafile=/x\nregistry = "https://one.example/npm/"\n')
    assert npm_registry() == "https://one.example/npm/"
    (settings / "other").write_text("registry=https://${NPM_HOST}/npm")
    monkeypatch.setenv("NPM_CONFIG_USERCONFIG", str(settings / "other"))
    monkeypatch.setenv("NPM_HOST", "two.example")
    assert npm_registry() == "https://two.example/npm"
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "https://three.example")
            assert npm_registry() == "https://three.example"


def test_npm(settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tarball({"package/a.png": b"1", "package/README.md": b"2"})
    server.files["/npm/pictures/-/pictures-1.2.tgz"] = archive
    monkeypatch.setenv("npm_config_registry", f"{server.address}/npm/")
    origin = NpmPackage("pictures", "1.2", sha256(archive))
    assert str(origin) == "the npm package pictures 1.2"
    assert collected(origin, settings, lambda name: name.endswith(".png")) == {"a.png": b"1"}
    assert server.asked == ["/npm/pictures/-/pictures-1.2.tgz"]


def idx_files(place: Path) -> dict[str, bytes]:
    write_idx(place)
    return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST"])
def test_mnist_by_torchvision(
    settings: Path,
    server: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    dataset: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = getattr(pytest.importorskip("torchvision.datasets"), dataset)
    files = idx_files(settings / "made")
    server.files |= {f"/m/{name}": content for name, content in files.items()}
    monkeypatch.setattr(found, "mirrors", [f"{closed_address()}/", f"{server.address}/m/"])
    monkeypatch.setattr(found, "resources", [(name, md5(content)) for name, content in files.items()])
    origin = TorchvisionFiles(dataset)
    assert str(origin) == f"torchvision.datasets.{dataset}"
    assert collected(origin, settings) == files
    assert capsys.readouterr().out == ""


def test_damage_on_the_way_from_torchvision(
    settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pytest.importorskip("torchvision.datasets").MNIST
    files = idx_files(settings / "made")
    server.files |= {f"/{name}": content[:-1] for name, content in files.items()}
    monkeypatch.setattr(found, "mirrors", [f"{server.address}/"])
    monkeypatch.setattr(found, "resources", [(name, md5(content)) for name, content in files.items()])
    with pytest.raises(UnavailableError, match=r"Error downloading .*ubyte\.gz: Tried .* File not found or corrupted"):
        collected(TorchvisionFiles("MNIST"), settings)


def test_cifar_by_torchvision(settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pytest.importorskip("torchvision.datasets").CIFAR10
    write_cifar(settings / "made", "python3")
    folder = "cifar-10-batches-py"
    files = {f"{folder}/{path.name}": path.read_bytes() for path in (settings / "made" / folder).iterdir()}
    archive = tarball({**files, "../evil": b"x", f"{folder}/readme.html": b""})
    server.files["/cifar.tgz"] = archive
    monkeypatch.setattr(found, "url", f"{server.address}/cifar.tgz")
    monkeypatch.setattr(found, "tgz_md5", md5(archive))
    # Its own reader unpickles whatever is in the files: it is never asked.
    monkeypatch.setattr("pickle.load", lambda *args, **options: pytest.fail("unpickled"))
    origin = TorchvisionArchives("CIFAR10", (("cifar-10-python.tar.gz", sha256(archive)),))
    assert collected(origin, settings, lambda name: not name.endswith((".html", ".gz"))) == files
    assert not list(settings.rglob("evil"))
    wrong = TorchvisionArchives("CIFAR10", (("cifar-10-python.tar.gz", "0" * 64),))  # while the MD5 is right
    (settings / "again").mkdir()
    with pytest.raises(UnavailableError, match=r"cifar-10-python\.tar\.gz has sha256 \w{64}, not 0{64}"):
        collected(wrong, settings / "again", lambda name: not name.endswith(".gz"))


def test_without_torchvision(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(
        UnavailableError, match=r"torchvision is needed for fetching .*pip install \"pyglow-fast\[train\]"
    ):
        collected(TorchvisionFiles("MNIST"), settings)


PATH = "/pictures/-/pictures-1.2.tgz"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (404, f"http://127.0.0.1:[0-9]+{PATH} answered 404 Not Found"),
        (503, "answered 503 Service Unavailable"),
        (
            b"other",
            r"pictures-1\.2\.tgz has sha256 d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa, not x",
        ),
        (None, f"{PATH}: .*timed out"),
    ],
)
def test_failures_of_a_host(
    settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, content: bytes | int | None, message: str
) -> None:
    monkeypatch.setenv("npm_config_registry", server.address)
    monkeypatch.setattr(origins, "PATIENCE", 0.3)
    server.files[PATH] = content
    with pytest.raises(UnavailableError, match=message):
        collected(NpmPackage("pictures", "1.2", "x"), settings)
    assert socket.getdefaulttimeout() is None


def test_a_damaged_archive_of_the_right_digest(
    settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("npm_config_registry", server.address)
    server.files[PATH] = b"no tarball"
    with pytest.raises(UnavailableError, match=r"pictures-1\.2\.tgz is damaged \(file could not be opened"):
        collected(NpmPackage("pictures", "1.2", sha256(b"no tarball")), settings)


def test_nothing_listens(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", closed_address())
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:\d+/pictures/-/pictures-1\.2\.tgz: .*refused"):
        collected(NpmPackage("pictures", "1.2", ""), settings)


def test_a_full_disk_is_no_matter_of_the_host(
    settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        collected(NpmPackage("pictures", "1.2", ""), settings)
