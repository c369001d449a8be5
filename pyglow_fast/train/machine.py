"""Tells what a run depends on besides its settings: the device, and the code that writes checkpoints."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from pyglow_fast import _backend, info
from pyglow_fast._errors import expect
from pyglow_fast.train.config import check_device


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Choose the device that a config's ``device`` means here; "auto" and "cuda" are the GPU of this rank."""
    check_device(name)
    module = _backend.extension()
    if module is not None:
        module.instruction_set()  # else the first kernel would refuse, when a run folder is there already
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        found = f"{name!r} with {count} CUDA devices"
        expect((device.index or 0) < count, "device", "a device that torch finds", found)
    return device


@functools.cache
def versions() -> dict[str, str]:
    """Look up the versions of the package and of torch, and a digest of the package's own files."""
    root = Path(info.__file__).parent
    files = sorted([*root.rglob("*.py"), *root.glob("_C*")])
    digest = hashlib.sha256(b"".join(path.relative_to(root).as_posix().encode() + path.read_bytes() for path in files))
    version = info.version_of("pyglow-fast")
    return {"pyglow_fast": version, "code": digest.hexdigest()[:12], "torch": torch.__version__}
