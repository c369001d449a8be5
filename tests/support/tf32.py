"""TF32 on the CPU: torch's products and convolutions round what they multiply as on a GPU, where the settings say so.

TF32 has the exponent of float32 and 10 bits behind the point. Numbers are rounded to the nearest, half away from zero,
as ``cvt.rna.tf32`` does; a library may cut instead, which is at most twice as far off. Sums are float32's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyglow_fast._core import float32
from support.captures import use_library

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: (0, 1), _aten.bmm.default: (0, 1)}
_PRODUCTS |= {_aten.addmm.default: (1, 2), _aten.baddbmm.default: (1, 2)}  # what they add to is not multiplied
# The product of a matrix and a vector rounds nothing: torch asks cuBLAS not to (NoTF32Guard in its gemv).
_CONVOLUTIONS = {_aten.convolution.default: (0, 1), _aten.convolution_backward.default: (0, 1, 2)}


def rounded(x: Tensor) -> Tensor:
    """x, float32, to the nearest TF32 number, half away from zero; what is not finite stays."""
    nearest = ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)


class Tf32(TorchDispatchMode):
    """Rounds the operands where a GPU would; ``counts`` says how often, of "matmul" and of "conv"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"matmul": 0, "conv": 0}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        backends: Any = torch.backends
        values = list(args)
        for name, ops, place in (
            ("matmul", _PRODUCTS, backends.cuda.matmul),
            ("conv", _CONVOLUTIONS, backends.cudnn.conv),
        ):
            if func in ops and place.fp32_precision == "tf32" and values[ops[func][0]].dtype == torch.float32:
                self.counts[name] += 1
                for operand in ops[func]:
                    values[operand] = rounded(values[operand])
        return func(*values, **(kwargs or {}))


def _legacy() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def _new() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _around_all() -> None:
    torch.backends.fp32_precision = "tf32"


# TF32 allowed by each of torch's ways to say it. In torch's defaults, convolutions alone compute in TF32.
SETTINGS: dict[str, Callable[[], None]] = {
    "as torch comes": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": _legacy,
    "fp32_precision": _new,
    "fp32_precision of all": _around_all,
}


def reset() -> None:
    """The settings as torch comes with them, but that those of convolutions no longer follow the ones around them."""
    backends: Any = torch.backends
    torch.set_float32_matmul_precision("highest")
    for place in (backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv):
        place.fp32_precision = "none"
    # torch.export leaves that of oneDNN behind; torch.backends.mkldnn.fp32_precision would set the one around it.
    torch._C._set_fp32_precision_setter("mkldnn", "all", "none")
    backends.cudnn.allow_tf32 = True


@contextlib.contextmanager
def in_tf32(setting: str = "as torch comes", device: torch.device | str = "cpu", rounds: bool = True) -> Iterator[Tf32]:
    """A context with one of SETTINGS; the CPU is as a GPU: its settings count, and nets are left to the library.

    rounds: False where :func:`compiling` does it, since torch.compile takes no notice of a mode around it.
    """
    mode = Tf32()
    pretends = torch.device(device).type == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        if pretends:
            patch.setattr(float32, "backend_of", backend_of_all)
            use_library(patch)
        try:
            SETTINGS[setting]()
            with mode if pretends and rounds else contextlib.nullcontext():
                yield mode
        finally:
            reset()


def compiling(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """A backend of torch.compile whose graphs run under the emulation."""

    def run(*values: Tensor) -> Any:
        with Tf32():
            return graph(*values)

    return run


def backend_of_all(device: torch.device) -> str:
    """Takes every device for a GPU."""
    return "cuda"


backend_of_all._dynamo_marked_constant = True  # type: ignore[attr-defined]
