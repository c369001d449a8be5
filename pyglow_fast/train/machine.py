"""Tells what a run depends on besides its settings: the device, and the versions that write checkpoints."""

from __future__ import annotations

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


def versions() -> dict[str, str]:
    """Look up the versions of the package and of torch."""
    return {"pyglow_fast": info.version_of("pyglow-fast"), "torch": torch.__version__}
