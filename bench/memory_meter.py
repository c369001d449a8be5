"""How many bytes of tensors a piece of code has alive at its peak, counted exactly on any device.

Every tensor that comes out of an op is charged with its storage, once however many views there are, from the op that
made it until the storage is freed. What lies inside one op (scratch of a convolution) is not seen, nor are tensors that
existed before.
"""

from __future__ import annotations

import collections
import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMeter(TorchDispatchMode):
    """Counts while it is entered: ``now`` and ``peak``, bytes of live storages that were made inside.

    A storage made inside and freed after the exit is still subtracted from ``now``. One that is resized by hand, which
    is no op, counts with its new size from the next op on, if ``resizes`` is set: it costs a look at each at every op.
    """

    def __init__(self, resizes: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.resizes = resizes
        self._sizes: dict[int, int] = {}  # of the live storages made inside, by address of the StorageImpl
        self._ends: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.resizes:
            self._look_again()
        # torch.tensor makes its storage outside of any op and then passes it through this one.
        fresh = func is torch.ops.aten.lift_fresh.default
        known = set() if fresh else {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in known:
                self._charge(storage, func)
        return result

    def _charge(self, storage: torch.UntypedStorage, func: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        self._made(key, size, func)
        self._ends[key] = weakref.finalize(storage, self._release, key)
        self._ends[key].atexit = False

    def _release(self, key: int) -> None:
        self._freed(key)
        self.now -= self._sizes.pop(key)
        del self._ends[key]

    def _look_again(self) -> None:
        for key, end in list(self._ends.items()):
            alive = end.peek()
            size = alive[0].nbytes() if alive is not None else self._sizes[key]
            if size != self._sizes[key]:
                self._freed(key)
                self.now += size - self._sizes[key]
                self._sizes[key] = size
                self.peak = max(self.peak, self.now)
                self._made(key, size, "resized")

    def _made(self, key: int, size: int, func: Any) -> None:
        """For subclasses: a storage is charged."""

    def _freed(self, key: int) -> None:
        """For subclasses: a storage is about to be taken off."""


class Alive(NamedTuple):
    """Storages of one origin that were alive at a peak."""

    op: str
    size: int  # bytes of one
    count: int


class MemoryTrace(MemoryMeter):
    """A meter that remembers every event: what was alive at the peak, and the peak without some tensors."""

    def __init__(self, resizes: bool = False) -> None:
        super().__init__(resizes)
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
        parts = [Alive(op, size, count) for (op, size), count in counts.items()]
        return peak, sorted(parts, key=lambda part: -part.size * part.count)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(values) if isinstance(leaf, torch.Tensor)]


def peak_tensor_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors made by ``function()`` that were alive at one time."""
    gc.collect()
    with MemoryMeter() as meter:
        function()
    return meter.peak
