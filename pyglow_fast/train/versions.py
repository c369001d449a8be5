"""Tells which code wrote a checkpoint, so that a resumed run can say what has changed since."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from pyglow_fast import info


@functools.cache
def versions() -> dict[str, str]:
    """Look up the versions of the package and of torch, and a digest of the package's own files."""
    digest = hashlib.sha256()
    root = Path(info.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.glob("_C*")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    version = info.version_of("pyglow-fast")
    return {"pyglow_fast": version, "code": digest.hexdigest()[:12], "torch": torch.__version__}
