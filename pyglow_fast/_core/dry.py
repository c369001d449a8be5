"""The state of a dry run: a training step on tensors of device "meta", whose bytes are counted (see dry_run.py)."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _State(threading.local):
    """The dry run of a thread, if it is in one."""

    device: torch.device | None = None  # for which tensors on "meta" stand


state = _State()


def device_of(x: Tensor) -> torch.device:
    """The device of x; in a dry run the one that it stands for."""
    return state.device or x.device if x.is_meta else x.device


def is_dry(x: Tensor) -> bool:
    """Tells whether x is a tensor of a dry run of this thread."""
    return x.is_meta and state.device is not None
