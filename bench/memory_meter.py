"""How many bytes of tensors a piece of code has alive at its peak.

MemoryMeter, exact on any device: every tensor that comes out of an op is charged with its storage, once however many
views there are, from the op that made it until the storage is freed. What lies inside one op (scratch of a convolution)
is not seen, nor are tensors that existed before.

AllocatorTrace, of the CPU: what torch's allocator gives out, also inside ops. What a library takes from the system
itself is not seen, nor is scratch that a kernel's threads keep.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
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


class AllocatorTrace:
    """Allocations of torch's CPU allocator while it is entered, on all threads."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self._events: list[tuple[int, int, int]] = []  # (time, address, bytes given or minus bytes taken back)

    def __enter__(self) -> AllocatorTrace:
        self._profile.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._profile.__exit__(*failure)
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        waiting = list(results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
                fields = event.extra_fields
                self._events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
            waiting.extend(event.children)
        self._events.sort(key=lambda event: event[0])

    def peak_without(self, tensors: Iterable[torch.Tensor] = ()) -> int:
        """The most bytes given out inside and alive at one time, had these (live) tensors cost nothing."""
        last = {address: index for index, (_, address, size) in enumerate(self._events) if size > 0}
        left_out = {last.get(tensor.untyped_storage().data_ptr()) for tensor in tensors}
        given: dict[int, int] = {}  # live bytes by address
        now = peak = 0
        for index, (_, address, size) in enumerate(self._events):
            if size > 0:
                given[address] = 0 if index in left_out else size
                now += given[address]
                peak = max(peak, now)
            else:  # the profiler also tells of blocks that its earlier runs saw given out
                now -= given.pop(address, 0)
        return peak


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_iter(values) if isinstance(leaf, torch.Tensor)]


def peak_tensor_bytes(function: Callable[[], object]) -> int:
    """The most bytes of tensors made by ``function()`` that were alive at one time."""
    gc.collect()
    with MemoryMeter() as meter:
        function()
    return meter.peak
