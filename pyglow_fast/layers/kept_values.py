"""Whether tensors are what they were, by their values: writes through ``.data`` or numpy have no version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_LARGE = 4096  # elements: the others are gathered and compared in one go


class KeptValues:
    """The bits of tensors on the CPU as they were: whatever writes to them, of one element or by one ulp, is seen.

    Args:
        tensors: what is looked at, where it is now.
        live: tensors made of them, which are looked at no further where they are in the same memory themselves.
    """

    def __init__(self, tensors: Sequence[Tensor], live: Sequence[Tensor] = ()) -> None:
        times = Counter(tensor.data_ptr() for tensor in tensors)
        shared = {(one.data_ptr(), one.shape, one.stride(), one.dtype) for one in live if times[one.data_ptr()] == 1}
        bits: list[Tensor] = []
        for tensor in tensors:
            if (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) not in shared:
                bits.append(tensor.detach().view(_BITS[tensor.element_size()]))
        few = [one for one in bits if one.numel() < _LARGE and one.is_contiguous()]
        kinds = {kind: [one.flatten() for one in few if one.dtype == kind] for kind in _BITS.values()}
        self._small = [some for some in kinds.values() if some]
        self._large = [one.numpy() for one in bits if one.numel() >= _LARGE or not one.is_contiguous()]
        self._then = [*map(torch.cat, self._small)], [one.copy() for one in self._large]

    def same(self) -> bool:
        """Whether all are what they were."""
        small, large = self._then
        return all(map(torch.equal, map(torch.cat, self._small), small)) and all(
            map(np.array_equal, self._large, large)
        )
