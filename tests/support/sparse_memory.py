"""Tensors with a stride of more than 2^31 elements, in memory of which only the touched pages exist."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch import Tensor

FAR = 2**31 + 64  # elements, a multiple of a vector
_MOST = 32  # far strides in a tensor
_ROOM = 8192  # elements of a tensor beside its far stride
_MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on


class SparseMemory:
    """Memory for some tensors of type ``dtype`` with one stride of ``FAR`` elements each."""

    def __init__(self, dtype: torch.dtype, tensors: int = 8) -> None:
        if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
            pytest.skip("needs Linux and 64 bits to map memory that is not there")
        self._tensors, self._used = tensors, 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, (_MOST * FAR + tensors * _ROOM) * dtype.itemsize, flags=flags)
        except OSError:
            pytest.skip("the system does not map that much memory")
        self._memory = torch.frombuffer(memory, dtype=dtype)

    def far(self, x: Tensor, dim: str) -> Tensor:
        """The values of x (N, C, *spatial), its samples, channels or positions ``FAR`` elements apart.

        ``dim`` is "sample", "channel", "position" or, of images (N, C, H, W), "row"; x has at least two of them.
        """
        _, c, *spatial = x.shape
        p = x[0, 0].numel()
        if dim == "row":
            strides = [c * spatial[1], spatial[1], FAR, 1]
        else:
            sample, channel, position = {"sample": (FAR, p, 1), "channel": (p, FAR, 1), "position": (c, 1, FAR)}[dim]
            strides = [sample, channel, *(position * s for s in torch.empty(spatial, device="meta").stride())]
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        assert FAR <= last < _MOST * FAR, "not far enough, or too far"
        assert self._used < self._tensors, "more tensors than there is room for"
        held = self._memory.as_strided(x.shape, strides, self._used * _ROOM)
        self._used += 1
        return held.copy_(x)
