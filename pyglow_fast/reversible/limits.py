"""Keeps a run of steps that are recomputed out of what torch.compile traces."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}


def call_untraced(function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), which torch.compile must call and not trace: its backward decides by values."""
    # torch.compiler.disable imports all of torch._dynamo; where that has not happened nothing compiles.
    if "torch._dynamo" not in sys.modules:
        return function(*inputs)
    if function not in _untraced:
        _untraced[function] = torch.compiler.disable(function)
    return _untraced[function](*inputs)


call_untraced._torchdynamo_disable = True  # type: ignore[attr-defined]
