"""The precision in which torch's libraries multiply float32 numbers, by settings of the whole process.

On CUDA convolutions and products may round what they multiply to TF32, of 10 bits: torch's default lets convolutions do
so. On a CPU that has instructions for it, products and convolutions may round to bfloat16 or TF32 where the settings
ask for it. That is for coupling nets; what the flow multiplies itself must be as exact as its dtype.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.dry import device_of
from pyglow_fast._core.torch_private import constant_in_graphs

PRODUCTS, CONVOLUTIONS = "matmul", "conv"
TF32, FULL = "tf32", "ieee"


@functools.cache
def _knows_tf32(device: torch.device) -> bool:
    """Whether a GPU has TF32: from Ampere on; one that only stands in a trace is taken for such."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 8


@constant_in_graphs
def backend_of(device: torch.device) -> str | None:
    """The part of torch whose settings decide on a device; None where nothing is rounded."""
    if device.type == "cuda":
        return "cuda" if _knows_tf32(device) else None
    return "mkldnn" if device.type == "cpu" else None


@constant_in_graphs  # it compiles again where the answer for products on CUDA changes
def _setting(operation: str, device: torch.device) -> str:
    """Return the format torch may round operands of PRODUCTS or CONVOLUTIONS to: "tf32", "bf16", "ieee" or "none"."""
    backend = backend_of(device)
    if backend is None:
        return FULL
    if backend == "mkldnn":
        place: Any = getattr(torch.backends.mkldnn, operation)
    else:
        place = torch.backends.cuda.matmul if operation == PRODUCTS else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return str(place.fp32_precision)


def rounds(operation: str, x: Tensor) -> bool:
    """Tell whether torch's settings let it round float32 operands like x, in PRODUCTS or in CONVOLUTIONS."""
    return x.dtype == torch.float32 and _setting(operation, device_of(x)) in (TF32, "bf16")


def autocast_is_on(device_type: str) -> bool:
    """Whether torch.autocast is enabled for a type of device, which may be one that it does not know."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


@constant_in_graphs  # torch.compile of torch 2.11 cannot trace it
def _knows_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def has_tf32(x: Tensor) -> bool:
    """Whether x is on a GPU that rounds it to TF32 where the settings say so."""
    return x.dtype == torch.float32 and backend_of(device_of(x)) == "cuda"


class _Settings:
    """The settings of CUDA while someone wants them in some way: changed by the first, restored by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = {FULL: 0, TF32: 0}
        self._set_to: str | None = None
        self._before: list[tuple[Any, str]] = []

    def change(self, precision: str, by: int) -> None:
        """Counts one more (1) or one less (-1) who wants it. Who wants full precision has it, whatever others want."""
        with self._lock:
            self._wanted[precision] += by
            found = next((wanted for wanted in (FULL, TF32) if self._wanted[wanted]), None)
            if found == self._set_to:  # not even for a moment may those inside have other settings
                return
            self._set_to = found
            while self._before:
                place, value = self._before.pop()
                place.fp32_precision = value
            if found is not None:
                self._set(found)

    def _set(self, precision: str) -> None:
        """Set from the outermost setting inwards, as what is not set follows that around it and shall do so again.

        So a value that does not follow is the setting's own. Only the outermost tells its own at once, so that it is
        set first where the next one may be following it. Never by allow_tf32, which refuses once anyone has used these.
        """
        cudnn: Any = torch.backends.cudnn
        root: Any = torch.backends
        first = [root] if root.fp32_precision == cudnn.fp32_precision != "none" else []
        for place in (*first, cudnn, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
            now = place.fp32_precision
            if now != precision:
                self._before.append((place, now))
                place.fp32_precision = precision


_settings = _Settings()


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """A context in which CUDA computes in TF32 or in full precision ("ieee"), in all threads of the process.

    Settings that followed others do so again behind it.
    """
    _settings.change(precision, 1)
    try:
        yield
    finally:
        _settings.change(precision, -1)
