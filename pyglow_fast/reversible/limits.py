"""What a run of steps that are recomputed cannot do raises an error that says so."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._errors import expect

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Final(torch.autograd.Function):
    """Hands gradients on."""

    @staticmethod
    def forward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "double backward: the gradient of steps whose states or nets are recomputed has no derivative; "
            'memory="store" with PYGLOW_FORCE_REFERENCE=1 has one'
        )


def differentiable_once(backward: Backward) -> Backward:
    """For the backward of an autograd function: a second derivative raises.

    torch's once_differentiable raises only where the incoming gradients require one: those of a sum do not, and a
    penalty on such a gradient would then have a derivative of zero, silently.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        final = iter(_Final.apply(*[grad.detach().requires_grad_() for grad in found if grad is not None]))
        return tuple(None if grad is None else next(final) for grad in found)

    return checked


def refuse_transforms() -> None:
    """Refuse to run inside torch.func.grad, vmap and the like.

    Raises:
        ValueError: it does.
    """
    inside = torch._C._are_functorch_transforms_active()
    expected = 'no torch.func transform around it; memory="store" with PYGLOW_FORCE_REFERENCE=1 allows them'
    expect(not inside, "memory", expected, "one")


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
