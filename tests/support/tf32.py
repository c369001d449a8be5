"""TF32 on the CPU: torch's products and convolutions round what they multiply as on a GPU, where the settings say so.

TF32 has the exponent of float32 and 10 bits behind the point. Numbers are rounded to the nearest, half away from zero,
as ``cvt.rna.tf32`` does; a library may cut instead, which is no more than twice as far off. Sums are float32's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyglow_fast import _backend, _float32

TF32_EPS = 2.0**-10  # from 1 to the next number
_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)
_ADDED_PRODUCTS = (_aten.addmm.default, _aten.baddbmm.default)  # whose first operand is not multiplied
# Of a matrix and a vector nothing is rounded: torch asks cuBLAS not to (NoTF32Guard in its gemv).
_CONVOLUTIONS = (_aten.convolution.default, _aten.convolution_backward.default)  # backward: gradient, input, weight


def rounded(x: Tensor) -> Tensor:
    """x (float32, of any shape) to the nearest TF32 number, half away from zero; what is not finite stays."""
    bits = x.contiguous().view(torch.int32)
    nearest = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)


class Tf32(TorchDispatchMode):
    """Rounds the operands; ``counts`` says how often, of "matmul" and of "conv"."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"matmul": 0, "conv": 0}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = list(args)
        if func in _PRODUCTS + _ADDED_PRODUCTS and torch.backends.cuda.matmul.fp32_precision == "tf32":
            first = 1 if func in _ADDED_PRODUCTS else 0
            self._round(values, range(first, first + 2), "matmul")
        elif func in _CONVOLUTIONS and torch.backends.cudnn.conv.fp32_precision == "tf32":
            self._round(values, range(3 if func is _CONVOLUTIONS[1] else 2), "conv")
        return func(*values, **(kwargs or {}))

    def _round(self, values: list[Any], places: range, what: str) -> None:
        for place in places:
            if values[place].dtype == torch.float32:
                values[place] = rounded(values[place])
                self.counts[what] += 1


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package takes the CPU's settings for a GPU's, and leaves nets to the library, as it does on a GPU."""
    monkeypatch.setattr(_float32, "backend_of", lambda device: "cuda")
    monkeypatch.setattr(_backend, "nets", lambda: "library")
