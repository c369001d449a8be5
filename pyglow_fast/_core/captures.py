"""Rules for code that a CUDA graph may capture: all that outlives a step was there before the capture.

A capture runs nothing: it records what is to run at each replay. Values cannot be read in it, copies from the host
cannot be made, and what is set to zero in it is set to zero again by every replay. So what outlives a step is made by a
step before, as torch asks for one anyway (its libraries allocate in it), and a capture without one is refused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.tracing import is_traced

T = TypeVar("T")


def can_capture(device: torch.device) -> bool:
    """Tells whether CUDA graphs can be captured on a device."""
    return device.type == "cuda"


_rehearsals: list[None] = []  # those that are entered


@contextlib.contextmanager
def rehearsed() -> Iterator[None]:
    """A context in which code does what it would in a capture, but runs; torch refuses a read that would break one."""
    _rehearsals.append(None)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
        _rehearsals.pop()


def is_capturing(device: torch.device) -> bool:
    """Tells whether a CUDA graph is being captured on the current stream of a device, or that is rehearsed."""
    if not can_capture(device) or is_traced():
        return False
    if _rehearsals:
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_first_use(device: torch.device, what: str) -> None:
    """Refuse to make, while a CUDA graph is captured on a device, ``what`` its replays are to find there."""
    expected = "a step run before its capture, forward and backward, with inputs of the same shapes"
    expect(not is_capturing(device), "CUDA graph", expected, f"a capture that begins without {what}")


_held: dict[int, Any] = {}  # what captures have read, by id


def held(value: T, device: torch.device) -> T:
    """Returns the value; one that is asked for while a CUDA graph is captured is kept for good.

    The graph reads it at each replay, and nobody tells when the graph is gone.
    """
    if is_capturing(device):
        _held[id(value)] = value
    return value


def made_once(size: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A decorator that keeps the last ``size`` results of a function of hashable arguments, the last of them a device.

    The function makes constants on the host and copies them to the device. What was asked for in a capture is held.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(size)
        def made(*key: Any) -> T:
            refuse_first_use(key[-1], "constants for its shapes")
            return function(*key)

        @functools.wraps(function)
        def found(*key: Any) -> T:
            # A constant of what is recorded is made anew.
            return function(*key) if is_traced() else held(made(*key), key[-1])

        return found

    return decorate


class Later:
    """Values of a small tensor for the host to read once they have arrived, without stopping the stream."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._copy.copy_(values, non_blocking=True)
            with torch.cuda.device(values.device):
                self._event = torch.cuda.Event()
                self._event.record()
        else:
            self._copy = values.clone()

    def read(self) -> list[float] | None:
        """The values, flat; None as long as they are under way."""
        if self._event is not None and not self._event.query():
            return None
        return self._copy.flatten().tolist()
