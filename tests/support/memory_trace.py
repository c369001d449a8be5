"""A meter of live tensors that remembers what was alive at the peak."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from bench.memory_meter import MemoryMeter


class Alive(NamedTuple):
    """Storages of one origin that were alive at a peak."""

    op: str
    size: int  # bytes of one
    number: int


class MemoryTrace(MemoryMeter):
    """A meter that remembers every event: what was alive at the peak, and the peak without some tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []  # (serial number, bytes made or minus bytes freed)
        self._origins: list[str] = []  # op by serial number
        self._serials: dict[int, int] = {}  # of live storages, by address

    def _made(self, key: int, size: int, func: Any) -> None:
        self._serials[key] = len(self._origins)
        self._events.append((len(self._origins), size))
        self._origins.append(str(func))

    def _freed(self, key: int) -> None:
        self._events.append((self._serials.pop(key), -self._sizes[key]))

    def peak_without(self, tensors: Iterable[torch.Tensor] = ()) -> tuple[int, list[Alive]]:
        """The peak had these (live) tensors cost nothing from the start, and what was alive then, largest part first.

        Memory "beyond the gradients" is the peak without those tensors that end as gradients.
        """
        left_out = {self._serials.get(tensor.untyped_storage()._cdata) for tensor in tensors}
        now = peak = at = 0
        for index, (serial, size) in enumerate(self._events):
            now += 0 if serial in left_out else size
            if now > peak:
                peak, at = now, index + 1
        alive: dict[int, int] = {}
        for serial, size in self._events[:at]:
            if serial in left_out:
                continue
            if size > 0:
                alive[serial] = size
            else:
                alive.pop(serial, None)
        counts = collections.Counter((self._origins[serial], size) for serial, size in alive.items())
        parts = [Alive(op, size, number) for (op, size), number in counts.items()]
        return peak, sorted(parts, key=lambda part: -part.size * part.number)
