"""Answers what the adapters ask about tensors and classes, and remembers values of a layer beside its state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from pyglow_fast._captures import held
from pyglow_fast._errors import can_read
from pyglow_fast._tracing import is_watched
from pyglow_fast.interop.last_seen import LastSeen

T = TypeVar("T")
OWNERS = ("nflows", "pyglow_fast")


def ordinary(inputs: Tensor, *others: Tensor) -> bool:
    """Whether our operations take these tensors: plain ones of one dtype, float32 or float64, on one real device.

    They do not take them while torch.compile or torch.export traces, nor inside torch.func transforms or forward-mode
    differentiation, which know the library's operations only.
    """
    if is_watched():
        return False
    if inputs.dtype not in (torch.float32, torch.float64) or inputs.device.type == "meta":
        return False
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (inputs, *others))
    return plain and all(other.dtype == inputs.dtype and other.device == inputs.device for other in others)


def as_it_comes(layer: object, *methods: str) -> bool:
    """Whether these methods of a layer are the library's or ours: none of a subclass, none put on the instance."""
    layer_class = type(layer)
    own = all(getattr(layer_class, name).__module__.split(".")[0] in OWNERS for name in methods)
    return own and not any(name in vars(layer) for name in methods)


class Derived(Generic[T]):
    """A value for each layer, derived from tensors of it, while these are what they were: see LastSeen.

    Values are kept beside the layers, so that the layers have no attribute that those of the library lack, and copies
    of them start anew. Tensors made in inference mode, and traced ones, have no version: then the value is derived each
    time.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, tuple[LastSeen, T]] = weakref.WeakKeyDictionary()

    def get(self, layer: nn.Module, tensors: Sequence[Tensor], derive: Callable[[], T]) -> T:
        """Return the value for a layer, from ``derive()`` if any of the tensors is new or was written to."""
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return derive()
        kept = self._kept.get(layer)
        if kept is not None and kept[0].same(tensors):
            return held(kept[1], tensors[0].device)
        value = derive()
        self._kept[layer] = (LastSeen(tensors), value)
        return value


_initialized: Derived[bool] = Derived()


def is_initialized(layer: nn.Module) -> bool:
    """Read an actnorm's buffer ``initialized``, from a GPU only when it may have changed."""
    flag: Tensor = layer.initialized  # type: ignore[assignment]
    return bool(flag) if can_read(flag) else _initialized.get(layer, [flag], lambda: bool(flag))
