"""How many bytes of tensors a piece of code has alive at its peak, counted exactly on any device.

Every tensor that comes out of an op is charged with its storage, once however many views there are, from the op that
made it until the storage is freed. What lies inside one op (scratch of a convolution) is not seen, nor are tensors that
existed before.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMeter(TorchDispatchMode):
    """Counts while it is entered: ``now`` and ``peak``, bytes of live storages that were made inside.

    A storage made inside and freed after the exit is still subtracted from ``now``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # of the live storages made inside, by address of the StorageImpl

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.tensor makes its storage outside of any op and then passes it through this one.
        fresh = func is torch.ops.aten.lift_fresh.default
        known = set() if fresh else {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if storage._cdata not in known:
                self._charge(storage)
        return result

    def _charge(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(values) if isinstance(leaf, torch.Tensor)]


def peak_tensor_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors made by ``function()`` that were alive at one time."""
    gc.collect()
    with MemoryMeter() as meter:
        function()
    return meter.peak
