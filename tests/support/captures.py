"""CUDA graphs without a GPU: a recording that replays operations alone, and a guard that refuses what a capture would.

The CPU stands for the device. What the code asks about itself (whether values may be read, whether a graph is being
captured) is answered as on a GPU while :func:`like_a_gpu` or :func:`capturing` are entered.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pyglow_fast._core import backend
from pyglow_fast._core.backend import extension, require
from pyglow_fast.models import replays
from pyglow_fast.runs import compiled, python_steps


@contextlib.contextmanager
def _answering(**answers: bool) -> Iterator[None]:
    """A context in which functions of these names answer so, in whatever module of the package they were imported."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "pyglow_fast":
                for question in answers.keys() & vars(module).keys():
                    own = mock.patch.object(module, question, lambda *_, answer=answers[question]: answer)
                    stack.enter_context(own)
        yield


def like_a_gpu(compiled: bool = True) -> contextlib.AbstractContextManager[None]:
    """A context in which code takes the CPU for a GPU: values may not be read, a graph might be captured.

    csrc/run executes the steps, also while a recording watches, unless Python is to (not compiled).
    """
    runs = compiled and extension() is not None
    return _answering(can_read=False, can_capture=True, is_capturing=False, is_runnable=runs)


def use_library(patch: pytest.MonkeyPatch, way: str = "library") -> None:
    """Make nets the library's convolutions, or its products of "rows", on the CPU as on a GPU."""
    patch.setattr(backend, "_nets", lambda: way)


def capturing() -> contextlib.AbstractContextManager[None]:
    """A context in which code is told that a graph is being captured."""
    return _answering(can_read=False, can_capture=True, is_capturing=True)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The inputs that an operation writes to, by its schema."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


@dataclass
class _Operation:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: list[torch.UntypedStorage | None]  # of its results: where those are that it allocates

    def repeat(self) -> None:
        """Run it again; memory that it only allocates holds nothing."""
        if self.func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            for place in self.places:
                assert place is not None
                _ruin(place)
            return
        results = _tensors(self.func(*self.args, **self.kwargs))
        for place, result in zip(self.places, results, strict=True):
            if place is not None:
                place.copy_(result.untyped_storage())


class Recording(TorchDispatchMode):
    """A step as a CUDA graph has it: its operations, on the memory of one run, repeated without the Python around them.

    While it is entered torch's operations and this package's kernels are recorded. They run, since sizes are needed,
    but nothing is left of that when it is closed: memory from elsewhere is as it was, and what was allocated within
    holds no numbers until a replay. In a replay all run on the same memory as before: results are put where the first
    ones were, zeros are filled in again, random numbers are drawn anew; what the host has decided stays decided.
    Writes are not seen by the versions of tensors.
    """

    METADATA = ("set_", "resize_", "set_data")  # memory that moves cannot be replayed

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[Callable[[], object]] = []
        self._inside = False  # of an operation: what that launches is its own affair
        self._own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in self.METADATA, f"{name} cannot be replayed"
        written = _written(func, args, kwargs)
        for tensor in written:
            self._keep(tensor.untyped_storage())
        known = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        # As they are now, on the same memory, and so that writes do not show in the versions of others.
        own_args, own_kwargs = tree_map_only(Tensor, lambda value: value.data, (args, kwargs))
        self._inside = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._inside = False
        storages = [tensor.untyped_storage() for tensor in _tensors(out)]
        places = [None if storage._cdata in known else storage for storage in storages]
        self._own.update((storage._cdata, storage) for storage in places if storage is not None)
        if written or any(place is not None for place in places):
            self._operations.append(_Operation(func, own_args, own_kwargs, places).repeat)
        return out

    def __enter__(self) -> Recording:
        if extension() is not None:
            require().on_launch(self._launched)
        super().__enter__()
        return self

    def _launched(self, launch: Callable[[], object]) -> None:
        if not self._inside:
            self._operations.append(launch)

    def _keep(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._own and storage._cdata not in self._before:
            self._before[storage._cdata] = (storage, storage.clone())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if extension() is not None:
            require().on_launch(None)
        for storage, before in self._before.values():
            storage.copy_(before)
        for storage in self._own.values():
            _ruin(storage)

    def replay(self) -> None:
        """Repeat all operations of the recording."""
        with torch.no_grad(), torch._C._DisableAutocast():  # below both: their part is recorded
            for operation in self._operations:
                operation()


def _ruin(storage: torch.UntypedStorage) -> None:
    """Fill memory with what no result is: NaN in floating types, -1 in signed ones."""
    if storage.nbytes():
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)


class NotCapturableError(RuntimeError):
    """Raised by what a CUDA graph cannot be captured with."""


# Operations whose result, or the size of it, the host needs.
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim"}
READS |= {"unique_consecutive", "bincount", "equal", "histogram", "_linalg_check_errors"}
# Factorisations of a matrix, and solving by them: these call libraries that allocate for themselves, or wait.
_FACTORISATIONS = re.compile(
    r"_?linalg_(inv|slogdet|det|lu|solve_ex|qr|svd|eig|cholesky|ldl|lstsq|pinv|matrix_exp)|_?linalg_solve$"
    r"|linalg_solve_ex|_lu_with_info|lu_unpack|lu_solve|inverse|cholesky|geqrf|ormqr|logdet|slogdet"
)


def waits(func: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    """Whether the host needs what an operation gives; csrc/run asks by ``item``, Python by what that calls.

    csrc/run asks on the CPU, and there alone, whether a matrix is singular, a bool.
    """
    name = func.overloadpacket.__name__
    return name in READS or (name == "item" and args[0].dtype != torch.bool)


_MASKS = (torch.bool, torch.uint8)
# Functions that bring the values of Python's own numbers to a tensor, and values of a tensor to the host.
_FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.scalar_tensor)
_FACTORY_NAMES = "arange empty empty_strided eye full linspace ones rand randint randn randperm zeros"
_FACTORIES = [getattr(torch, name) for name in re.findall(r"\w+", _FACTORY_NAMES)]
_TO_HOST = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.pin_memory, Tensor.__array__)


class _Functions(TorchFunctionMode):
    """The part of the guard that sees which arguments Python has given."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func in _FROM_HOST and not (args and isinstance(args[0], Tensor)):
            raise NotCapturableError(f"{name}: a copy from the host")
        if func in _TO_HOST:
            raise NotCapturableError(f"{name}: a copy to the host")
        if kwargs.get("pin_memory"):
            raise NotCapturableError(f"{name}: memory outside of torch's pool")
        # The CPU by its name is the host; the device's own is taken from a tensor, and is a torch.device.
        places = [kwargs.get("device"), *(args[1:] if func is Tensor.to else ())]
        if any(isinstance(place, str) and place == "cpu" for place in places):
            raise NotCapturableError(f"{name}: on the host")
        if func in _FACTORIES and places[0] is None:
            raise NotCapturableError(f"{name}: on the host, without a device")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                raise NotCapturableError(f"{name}: a copy of indices from the host")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """The part of the guard that sees what runs, in the backward too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if waits(func, args) or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            raise NotCapturableError(f"{name}: the host reads a value")
        is_index = len(args) > 1 and name.startswith(("index", "_index", "_unsafe_index"))
        if is_index and any(tensor.dtype in _MASKS for tensor in _tensors(args[1])):
            raise NotCapturableError(f"{name}: the host counts what a mask chooses")
        if func.namespace == "aten" and _FACTORISATIONS.match(name):
            raise NotCapturableError(f"{name}: a factorisation")
        if name in ("lift", "lift_fresh", "_pin_memory"):
            raise NotCapturableError(f"{name}: a copy from the host")
        return func(*args, **kwargs)


def _refused(what: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise NotCapturableError(f"{what} while a graph is captured")

    return call


@contextlib.contextmanager
def capture_guard() -> Iterator[None]:
    """Refuses what a CUDA graph cannot be captured with, while the code is told that one is.

    Refused are reads of values by the host, in whatever form; copies between host and device, of which tensors of
    Python's numbers are one; factorisations of matrices; memory that is not torch's; questions to events, waits, other
    streams.

    Raises:
        NotCapturableError: inside, with the operation's name.
    """
    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch.cuda, ("synchronize", "set_stream", "stream", "mem_get_info", "get_rng_state", "set_rng_state")),
            (torch.cuda.Event, ("query", "synchronize", "elapsed_time", "record", "wait")),
            (torch.cuda.Stream, ("query", "synchronize", "wait_stream", "wait_event")),
        ):
            for name in names:
                what = f"{owner.__name__}.{name}"
                stack.enter_context(mock.patch.object(owner, name, _refused(what)))
        stack.enter_context(capturing())
        stack.enter_context(_Functions())
        stack.enter_context(_Operations())
        yield


class Side:
    """A stand-in for the side stream."""

    def entered(self, stream: object) -> contextlib.AbstractContextManager[None]:
        assert stream is self
        return contextlib.nullcontext()

    def capture(self, function: Callable[[], Any], stream: object) -> tuple[Callable[[], None], Any]:
        assert stream is self, "captured on another stream than the one that was warmed up"
        with Recording() as graph, capture_guard():
            result = function()
        return graph.replay, result


@contextlib.contextmanager
def recorded_graphs() -> Iterator[Side]:
    """A context in which Replays takes the CPU for a GPU, and its captures are recordings."""
    side = Side()
    own = {"_side_stream": lambda device: side, "_on": side.entered, "_capture": side.capture}
    own["rehearsed"] = capture_guard
    with like_a_gpu(), mock.patch.multiple(replays, **own):
        yield side


class _Wrong:
    """The extension, whose backward of a run in mode "reversible" begins from another output than the true one."""

    def __init__(self, factor: Tensor, only: int | None) -> None:
        self._factor, self._only, self._calls = factor, only, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(require(), name)

    def BackwardArgs(self, z: Any, **rest: Any) -> Any:
        """With z off by the factor in all nodes, or in one, counted from the last."""
        self._calls += 1
        wrong = z is not None and self._only in (None, self._calls)  # none where all states are kept
        return require().BackwardArgs(z=z * self._factor if wrong else z, **rest)


def plant(patch: pytest.MonkeyPatch, factor: float | Tensor, only: int | None = None) -> Tensor:
    """Make the states that the compiled run recomputes wrong from now on; the factor may be written to later.

    Args:
        patch: undoes it.
        factor: that the output, from which a backward begins, is multiplied by.
        only: of so many nodes that a backward runs through, counted from 1, that one; None: all.
    """
    held = torch.as_tensor(factor)
    wrong = _Wrong(held, only)
    patch.setattr(compiled, "require", lambda: wrong)
    return held


def drifting(patch: pytest.MonkeyPatch, like: Tensor) -> Tensor:
    """Makes recomputed states of flow steps wrong by a factor: the tensor returned, which replays read; 1 at first."""
    factor, true = plant(patch, like.new_ones(())), python_steps.coupling_backward_from_output

    def wrong(*inputs: Any) -> tuple[Tensor, ...]:
        found, *grads = true(*inputs)
        return factor * found, *grads

    patch.setattr(python_steps, "coupling_backward_from_output", wrong)
    return factor
