"""Reads the named tensors of a checkpoint, each taken once and of the shape that it must have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyglow_fast._errors import expect

_WRAPPERS = ("graph", "model", "state_dict", "model_state_dict", "net")
_AROUND_MODULES = re.compile(r"(?:module\.|_orig_mod\.)+")  # prefixes of DataParallel and torch.compile


def named_tensors(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Collect the tensors of a state dict or of a file's content by their plain names.

    Dicts around the state dict (with a step, an optimizer, ...) are opened, arrays become tensors, the ``module.`` and
    ``_orig_mod.`` that DataParallel and torch.compile put in front of names go.

    Raises:
        ValueError: no dict, none with tensors, something else among them, or two of one name.
    """
    expect(isinstance(source, Mapping), "state", "a dict of tensors or arrays", type(source).__name__)
    while any(isinstance(value, Mapping) for value in source.values()):
        inner = next((key for key in _WRAPPERS if isinstance(source.get(key), Mapping)), None)
        expected = f"a state dict, or one within a dict under {', '.join(_WRAPPERS)}"
        expect(inner is not None, "state", expected, f"a dict with {sorted(map(str, source))}")
        source = source[inner]  # type: ignore[index]
    expect(len(source) > 0, "state", "tensors", "an empty dict")
    found: dict[str, Tensor] = {}
    for name, value in source.items():
        is_array = isinstance(value, Tensor | np.ndarray | np.generic)
        expect(is_array, str(name), "a tensor or an array", type(value).__name__)
        prefix = _AROUND_MODULES.match(str(name))
        plain = str(name)[prefix.end() :] if prefix else str(name)
        expect(plain not in found, str(name), f"one tensor of the name {plain!r}", "two")
        found[plain] = _dense(torch.as_tensor(value), str(name))
    return found


def _dense(tensor: Tensor, name: str) -> Tensor:
    strided = tensor.layout == torch.strided and tensor.device.type != "meta" and not tensor.is_quantized
    found = f"{tensor.dtype}, {tensor.layout}, device {tensor.device}"
    expect(strided and not tensor.is_complex(), name, "a tensor of plain real numbers", found)
    return tensor.detach().cpu()


class Reader:
    """A reader that takes tensors by name; what is missing, misshapen or left over is named in the error.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors, self._left = tensors, dict(tensors)
        self._dtypes: set[torch.dtype] = set()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model: float64 if all numbers taken so far have it, else float32."""
        return torch.float64 if self._dtypes == {torch.float64} else torch.float32

    def has(self, prefix: str) -> bool:
        """Whether some name starts with ``prefix``."""
        return any(name.startswith(prefix) for name in self._tensors)

    def contains(self, part: str) -> bool:
        """Whether some name has ``part`` anywhere."""
        return any(part in name for name in self._tensors)

    def count(self, prefix: str) -> int:
        """Count how many of ``prefix`` with 0, 1, 2, ... in the place of {} start some name."""
        n = 0
        while self.has(prefix.format(n)):
            n += 1
        return n

    def indices(self, prefix: str) -> list[int]:
        """List the numbers that follow ``prefix`` in the names."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return sorted({int(match[1]) for match in map(pattern.match, self._tensors) if match})

    def size(self, name: str, dim: int) -> int:
        """The size of a tensor along one dimension.

        Raises:
            ValueError: it is missing, or has not so many dimensions.
        """
        self._must_have(name)
        tensor = self._tensors[name]
        least = dim + 1 if dim >= 0 else -dim
        expect(tensor.dim() >= least, name, f"at least {least} dimensions", f"shape {tuple(tensor.shape)}")
        return tensor.shape[dim]

    def take(self, name: str, *shape: int) -> Tensor:
        """Take a tensor, which must have that shape; a floating one is converted to float64.

        Raises:
            ValueError: it is missing, has another shape, or is not finite.
        """
        self._must_have(name)
        tensor = self._tensors[name]
        expect(tuple(tensor.shape) == shape, name, f"shape {shape}", f"shape {tuple(tensor.shape)}")
        self._left.pop(name, None)
        if not tensor.is_floating_point():
            return tensor
        expect(bool(tensor.isfinite().all()), name, "finite numbers", "NaN or inf")
        self._dtypes.add(tensor.dtype)
        return tensor.double()

    def invertible(self, name: str, *shape: int) -> Tensor:
        """Take a square matrix, (C, C, ...) of that shape with ones after it, as (C, C).

        Raises:
            ValueError: see :meth:`take`; it is singular.
        """
        matrix = self.take(name, *shape).flatten(1)
        regular = bool(torch.linalg.slogdet(matrix.double()).logabsdet.isfinite())
        expect(regular, name, "an invertible matrix", "a singular one")
        return matrix

    def signs(self, name: str, channels: int) -> Tensor:
        """Take a tensor of 1 and -1, (channels,).

        Raises:
            ValueError: see :meth:`take`; it has others.
        """
        found = self.take(name, channels)
        expect(bool((found.abs() == 1).all()), name, "1 and -1 alone", found.tolist())
        return found

    def order(self, name: str, channels: int) -> Tensor:
        """Take a tensor that is an order of 0 .. channels - 1, (channels,) int64.

        Raises:
            ValueError: it is missing, or is none.
        """
        index = self.take(name, channels).long()
        ordered = torch.equal(index.sort().values, torch.arange(channels))
        expect(ordered, name, f"each of 0..{channels - 1} once", index.tolist())
        return index

    def permutation(self, name: str, channels: int) -> Tensor:
        """Take a permutation matrix as its order i -> j, P[i, j] = 1, (channels,) int64.

        Raises:
            ValueError: it is missing, or is none.
        """
        matrix = self.take(name, channels, channels)
        index = matrix.argmax(dim=1)
        is_one = torch.equal(torch.eye(channels, dtype=torch.float64)[index], matrix.double())
        expect(is_one and len(set(index.tolist())) == channels, name, "a permutation matrix", "another one")
        return index

    def drop(self, pattern: str) -> None:
        """Leave out tensors whose name matches (a regular expression from its beginning)."""
        for name in [name for name in self._left if re.match(pattern, name)]:
            del self._left[name]

    def finish(self) -> None:
        """Refuse tensors that nobody took.

        Raises:
            ValueError: there is some.
        """
        left = sorted(self._left)
        if left:
            raise ValueError(f"{left[0]}: expected no tensor of that name, found {len(left)} that do not belong")

    def _must_have(self, name: str) -> None:
        expect(name in self._tensors, name, "a tensor of that name", "none")
