"""Finds the device that this process trains on by the name that the settings have."""

from __future__ import annotations

import torch

from pyglow_fast import _backend
from pyglow_fast._errors import expect
from pyglow_fast.train.config import check_device


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Choose the device that a config's ``device`` means here; "auto" and "cuda" are the GPU of this rank.

    Raises:
        ValueError: no such name, CUDA is asked for and torch finds none, or the environment variable PYGLOW_CPU names
            kernels that do not run here.
    """
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
