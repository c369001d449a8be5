"""Archives as packages have them, made of names and contents."""

from __future__ import annotations

import io
import tarfile
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
