"""What a run of steps that are recomputed cannot do raises an error that says so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from pyglow_fast._errors import expect
from pyglow_fast._tracing import has_transforms


def refuse_transforms() -> None:
    """Refuse to run inside torch.func.grad, vmap and the like, or forward-mode AD.

    Raises:
        ValueError: it does.
    """
    expect(not has_transforms(), "memory", 'no torch.func transform around it; memory="store" allows them', "one")


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
