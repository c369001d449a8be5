"""The meter of the memory benchmark, for the tests: bench/memory_meter.py is its home."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from bench.memory_meter import AllocatorTrace, MemoryMeter, MemoryTrace, peak_tensor_bytes  # noqa: E402

__all__ = ["AllocatorTrace", "MemoryMeter", "MemoryTrace", "peak_tensor_bytes"]
