"""Coupling nets by the library's convolutions on the CPU, as a GPU runs them: cuDNN's op has a stand-in there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyglow_fast import _backend, convolutions


def use_library(patch: pytest.MonkeyPatch) -> None:
    """Makes nets the library's convolutions, on the CPU as on a GPU."""
    patch.setattr(_backend, "_nets", lambda: "library")


@contextmanager
def cudnn_stand_in(patch: pytest.MonkeyPatch, refuses: str = "") -> Iterator[list[tuple[Any, ...]]]:
    """``aten::cudnn_convolution_relu`` on the CPU, which is taken for a GPU; gives the arguments of its calls.

    It takes what cuDNN takes: one dtype of 16 or 32 bits, images and weights that lie channels-last without gaps.
    With ``refuses`` it raises that message.
    """
    calls: list[tuple[Any, ...]] = []

    def fused(*arguments: Any) -> Tensor:
        calls.append(arguments)
        x, weight, bias, stride, padding, dilation, groups = arguments
        if refuses:
            raise RuntimeError(refuses)
        assert x.dtype == weight.dtype == bias.dtype
        assert x.dtype in convolutions.FUSED_DTYPES
        assert lies_channels_last(x)
        assert lies_channels_last(weight)
        nothing = [0] * len(stride)
        out: Tensor = torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, nothing, groups)
        return out.relu_()

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution_relu", fused, "CPU")
    patch.setattr(convolutions, "cudnn_fuses", lambda h, weight: h.dim() == 4 and h.dtype in convolutions.FUSED_DTYPES)
    patch.setattr(convolutions, "_without_engine", set())
    try:
        yield calls
    finally:
        library._destroy()


def lies_channels_last(x: Tensor) -> bool:
    """Whether images or weights of 3x3 lie densely, the channels of a position side by side."""
    return x.is_contiguous(memory_format=torch.channels_last)


class Ops(TorchDispatchMode):
    """Notes the ops of torch's that run, by name, with their tensor arguments; views and empty memory are none."""

    FREE = frozenset(
        ("slice", "detach", "view", "reshape", "alias", "empty", "empty_like", "expand", "t", "_unsafe_view")
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.found.append((name, args))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of the calls of one op."""
        return [arguments for found, arguments in self.found if found == name]

    def names(self, least: int = 0) -> list[str]:
        """The names of all that ran on a tensor of at least so many elements."""
        return [
            name
            for name, args in self.found
            if any(isinstance(value, Tensor) and value.numel() >= least for value in args)
        ]
