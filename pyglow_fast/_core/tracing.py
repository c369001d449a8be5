"""Checks for what torch does with a call besides running it: transforms, traces and hooks, and what then steps aside.

A kernel is an op of this package. An exported program is to run where the package is not, and torch.func can
differentiate and batch torch's own ops only: there all functions are made of those, as pyglow_fast.reference has them.
torch.compile takes the kernels into its graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pyglow_fast._core.torch_private import (
    VMAP,
    constant_in_graphs,
    has_functorch,
    is_batched_tensor,
    tracing_state,
    transforms,
    untraced,
)

R = TypeVar("R")


def is_traced() -> bool:
    """Tells whether torch.compile or an export records what is called: then tensors have no values to decide by."""
    return torch.compiler.is_compiling() or tracing_state() is not None


def has_transforms() -> bool:
    """Tells whether a transform of torch.func, of whatever kind, or forward-mode AD is active."""
    return has_functorch() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Tells whether any of these sees the calls: then values, and places in memory, are not to be decided by."""
    return is_traced() or has_transforms()


def is_batched() -> bool:
    """Tells whether torch.func.vmap is at work, under which tensors have no values of their own."""
    if torch.compiler.is_compiling() or not has_functorch():
        return False
    return any(transform.key() == VMAP for transform in transforms())


def is_of_several(x: Tensor) -> bool:
    """Tells whether x is what torch.func.vmap makes of several tensors: then it has no values of its own."""
    return has_functorch() and is_batched_tensor(x)


def kernels_step_aside() -> bool:
    """Tells whether functions are to be made of torch's own ops, for torch.func or an export: see the module.

    An export is torch.export's, and so torch.onnx's and AOTInductor's, or one of torch.jit.trace.
    """
    return _is_exporting() or tracing_state() is not None or has_transforms()


@constant_in_graphs  # torch.compile of torch 2.11 takes it for True
def _is_exporting() -> bool:
    return torch.compiler.is_exporting()


_untraced: dict[Callable[..., Any], Callable[..., Any]] = {}  # torch.compile warns of a functools.cache


@untraced
def call_untraced(function: Callable[..., R], *inputs: Any) -> R:
    """Call function(*inputs) where torch.compile is at work and must not trace it: its backward decides by values."""
    if function not in _untraced:
        _untraced[function] = torch.compiler.disable(function)
    found: R = _untraced[function](*inputs)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a call of the module runs hooks around its forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_altered(module: nn.Module) -> bool:
    """Tell whether hooks, or a forward set on the module, make a call do something else than its class says."""
    return has_hooks(module) or "forward" in vars(module)


def any_altered(parts: Iterable[nn.Module | None]) -> bool:
    """Whether any of these parts has hooks, a forward of its own or parametrizations."""
    for part in parts:
        if part is not None and (
            part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or "parametrizations" in part._modules
            or "forward" in part.__dict__
        ):
            return True
    return False
