"""Precisions that coupling nets compute in; the flow state stays float32."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pyglow_fast._core import float32
from pyglow_fast._core.dry import device_of
from pyglow_fast._core.errors import expect

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("net_precision", default=None)


def dtype_on(x: Tensor) -> torch.dtype:
    """The dtype that a net computes in, given its input: under autocast that of the moment, where x is float32."""
    device_type = device_of(x).type
    narrow = x.dtype == torch.float32 and float32.autocast_is_on(device_type)
    return torch.get_autocast_dtype(device_type) if narrow else x.dtype


def check_precision(precision: str) -> str:
    """Refuse what is no known precision, and return it as it is."""
    expect(precision in PRECISIONS, "precision", f"one of {PRECISIONS}", repr(precision))
    return precision


def override() -> str | None:
    """The precision that a context has all nets of this thread compute in; None outside of such, and when compiled."""
    return None if torch.compiler.is_compiling() else _override.get()


@contextlib.contextmanager
def overridden(precision: str | None) -> Iterator[None]:
    """A context in which all nets of this thread compute in that precision, whatever they are set to; None: as set.

    What a backward runs again has that of its forward, by :func:`override`.
    """
    token = _override.set(precision)
    try:
        yield
    finally:
        _override.reset(token)


@contextlib.contextmanager
def _float32_nets(precision: str, x: Tensor) -> Iterator[None]:
    """A context without autocast; on a GPU, which may round what it multiplies to TF32, with or without that."""
    device_type = device_of(x).type
    without = (
        torch.autocast(device_type, enabled=False) if float32.autocast_is_on(device_type) else contextlib.nullcontext()
    )
    wanted = float32.TF32 if precision == "tf32" else float32.FULL
    with without, float32.computing_in(wanted) if float32.has_tf32(x) else contextlib.nullcontext():
        yield


def precisions_of(module: nn.Module) -> set[str]:
    """List the precisions that couplings in a module are set to run their nets in; "auto" alone if there is none."""
    found = (getattr(part, "precision", None) for part in module.modules())
    return {name for name in found if isinstance(name, str) and name in PRECISIONS} or {"auto"}


def in_precision(precision: str, x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which a net is to be run on x, to have that precision.

    "auto": as torch.autocast and torch's settings of the moment say; "bf16", "fp16": under autocast of that dtype;
    "fp32", "tf32": without autocast, TF32 off or on (on CUDA; elsewhere the two are the same). Compiled code runs
    under the settings of its run, which it cannot change: "tf32" leaves them as they are, "fp32" refuses others.

    Raises:
        ValueError: 16 bits where x is not float32; "fp32" under torch.compile where the settings allow TF32.
    """
    device_type, compiles = device_of(x).type, torch.compiler.is_compiling()
    if not compiles:
        precision = _override.get() or precision
    if precision in HALF:
        expect(x.dtype == torch.float32, "precision", f"one that goes with a state of {x.dtype}", repr(precision))
        return torch.autocast(device_type, dtype=HALF[precision])
    has_tf32 = float32.has_tf32(x)
    if precision == "auto" or not (has_tf32 or float32.autocast_is_on(device_type)):
        return contextlib.nullcontext()
    if not compiles:
        return _float32_nets(precision, x)
    if has_tf32 and precision == "fp32":
        found = [name for name in (float32.PRODUCTS, float32.CONVOLUTIONS) if float32.rounds(name, x)]
        expected = 'torch.backends.fp32_precision = "ieee" where "fp32" is compiled'
        expect(not found, "precision", expected, f"TF32 for {found}")
    return torch.autocast(device_type, enabled=False)
