"""Memory of the CPU that the kernels have used and that waits for another use; see docs/speed.md."""

from __future__ import annotations

from pyglow_fast._core import backend


def idle_memory() -> int:
    """Count the bytes of CPU memory that wait for another use, by outputs or coupling nets; 0 without the kernels.

    At most 64 MiB in the middle of a training step or an evaluation, and after it 32 MiB, but no more than the largest
    of the last 16 steps had in use.
    """
    module = backend.extension()
    return 0 if module is None else int(module.idle_bytes())


def release_memory() -> int:
    """Give the memory that waits, see :func:`idle_memory`, back to the system; the next step takes fresh pages.

    Memory of a GPU is torch's: ``torch.cuda.empty_cache()``.

    Returns:
        The bytes that waited.
    """
    waiting = idle_memory()
    module = backend.extension()
    if module is not None:
        module.release_idle()
    return waiting
