"""Tells how much memory the process holds now."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def memory_mb(device: torch.device) -> float:
    """Measure the CUDA memory that tensors use on ``device``, or this process's resident memory, in MB (10^6 bytes)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    if os.name != "posix":
        return 0.0  # no cheap way without another dependency
    import resource  # posix only

    # Elsewhere only the peak is known; macOS gives bytes, the others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
