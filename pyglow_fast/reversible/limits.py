"""A border that torch.compile does not cross: behind it steps are recomputed, which it must not trace."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def call_untraced(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call function(*inputs) where torch.compile must not trace it: its backward decides by values."""
    # torch.compiler.disable imports all of torch._dynamo; where that has not happened nothing compiles.
    if "torch._dynamo" not in sys.modules:
        return function(*inputs)
    if function not in _untraced:
        _untraced[function] = torch.compiler.disable(function)
    return _untraced[function](*inputs)


call_untraced._torchdynamo_disable = True  # type: ignore[attr-defined]
