"""The precision that coupling nets compute in; the flow state stays float32."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.reference import autocast_is_on

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("net_precision", default=None)


def check_precision(precision: str) -> str:
    """The precision, if it is one.

    Raises:
        ValueError: it is none.
    """
    expect(precision in PRECISIONS, "precision", f"one of {PRECISIONS}", repr(precision))
    return precision


@contextlib.contextmanager
def overridden(precision: str) -> Iterator[None]:
    """Inside, and in this thread, all nets compute in that precision, whatever they are set to."""
    token = _override.set(precision)
    try:
        yield
    finally:
        _override.reset(token)


@contextlib.contextmanager
def _full_precision(tf32: bool, device_type: str) -> Iterator[None]:
    """Without autocast; on CUDA, where products and convolutions may round their inputs to TF32, with or without that.

    Those settings are the process's: threads that run nets in different precisions at a time disturb each other.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    with torch.autocast(device_type, enabled=False) if autocast_is_on(device_type) else contextlib.nullcontext():
        try:
            if device_type == "cuda":
                products.allow_tf32 = convolutions.allow_tf32 = tf32
            yield
        finally:
            if device_type == "cuda":
                products.allow_tf32, convolutions.allow_tf32 = before


def half_dtype_of(module: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype that couplings in a module are set to run their nets in, of two the coarser; None if none is."""
    dtypes = [HALF[name] for part in module.modules() if (name := getattr(part, "precision", None)) in HALF]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def in_precision(precision: str, x: Tensor) -> contextlib.AbstractContextManager[object]:
    """The context that a net is to be run in on x.

    "auto": as torch.autocast and torch's settings of the moment say; "bf16", "fp16": under autocast of that dtype;
    "fp32", "tf32": without autocast, TF32 off or on (on CUDA; elsewhere the two are the same).

    Raises:
        ValueError: 16 bits where x is not float32.
    """
    device_type = x.device.type
    if not torch.compiler.is_compiling():
        precision = _override.get() or precision
    if precision in HALF:
        expect(x.dtype == torch.float32, "precision", f"one that goes with a state of {x.dtype}", repr(precision))
        return torch.autocast(device_type, dtype=HALF[precision])
    if precision == "auto" or (device_type != "cuda" and not autocast_is_on(device_type)):
        return contextlib.nullcontext()
    return _full_precision(precision == "tf32", device_type)
