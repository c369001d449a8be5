"""Archives as packages have them, made of names and contents."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Literal


def tarball(files: Mapping[str, bytes], packed: Literal["gz", "xz"] = "gz") -> bytes:
    """A .tar.gz or .tar.xz."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz" if packed == "gz" else "w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def zip_archive(files: Mapping[str, bytes]) -> bytes:
    """A .zip, or a wheel."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def ar_archive(members: Mapping[str, bytes]) -> bytes:
    """An ar archive as dpkg-deb writes it."""
    made = b"!<arch>\n"
    for name, content in members.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        made += head.encode() + content + b"\n" * (len(content) % 2)
    return made


def debian_package(files: Mapping[str, bytes], packed: Literal["gz", "xz"] = "xz") -> bytes:
    """A .deb; names count from the top of the file system."""
    data = tarball({f"./{name}": content for name, content in files.items()}, packed)
    return ar_archive({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{packed}": data})
