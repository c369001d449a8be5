"""Reads what is wanted out of a wheel, a zip, a tarball or a Debian package; nothing in them is run or installed."""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

_AR, _AR_HEAD = b"!<arch>\n", 60  # how an ar archive begins, and the bytes before each member of it


class DamagedArchiveError(ValueError):
    """An archive cannot be read; the message says why."""


@contextmanager
def _whole() -> Iterator[None]:
    """Makes one kind of error of what damaged archives raise."""
    try:
        yield
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise DamagedArchiveError(str(error)) from error


def unpack(archive: Path, below: str, ready: Path, wanted: Callable[[str], bool]) -> None:
    """Write the wanted files of an archive into a folder.

    Args:
        archive: ends in .whl or .zip, .deb, or is a tarball.
        below: the folder in the archive that names count from; empty: its top.
        ready: the folder to write to, made if it is not there.
        wanted: tells by the name of a file below that folder whether it is kept.

    Raises:
        DamagedArchiveError: it cannot be read.
        OSError: a file cannot be written.
    """
    ready.mkdir(exist_ok=True)
    prefix = f"{below}/" if below else ""
    with _whole():
        for member, read in _members(archive):
            name = member.removeprefix(prefix)
            if member.startswith(prefix) and _is_inside(name) and wanted(name):
                (ready / name).parent.mkdir(parents=True, exist_ok=True)
                (ready / name).write_bytes(read())


def _is_inside(name: str) -> bool:
    """Whether a name, which decides where the content goes, stays in the folder, on Windows too."""
    paths = PurePosixPath(name), PureWindowsPath(name)
    return not any(path.anchor or ".." in path.parts for path in paths)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and reader of each ordinary file."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as packed:
            for item in packed.infolist():
                if not item.is_dir():
                    yield item.filename, lambda item=item: packed.read(item)  # type: ignore[misc]
        return
    with (
        archive.open("rb") as file,
        tarfile.open(fileobj=_data_of_deb(file) if archive.suffix == ".deb" else file) as tar,
    ):
        for entry in tar:
            content = tar.extractfile(entry) if entry.isfile() else None
            if content is not None:
                yield entry.name.removeprefix("./"), content.read


def _data_of_deb(file: BinaryIO) -> BinaryIO:
    """The tarball data.tar.* in a Debian package, which is an ar archive.

    The standard library reads no ar archives, and dpkg-deb is on Debian's systems alone. Of the format this takes: the
    first eight bytes, then before each member 60 bytes, of which 0..15 are its name and 48..57 its size in decimal, and
    one byte behind a member of odd size.

    Raises:
        DamagedArchiveError: it is no ar archive, or has no such member.
    """
    if file.read(len(_AR)) != _AR:
        raise DamagedArchiveError("it is no Debian package")
    while len(head := file.read(_AR_HEAD)) == _AR_HEAD:
        digits = head[48:58].strip()
        if not digits.isdigit():
            break
        size = int(digits)
        if head.startswith(b"data.tar"):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise DamagedArchiveError("it has no data.tar")
