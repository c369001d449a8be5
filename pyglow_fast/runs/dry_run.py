"""Dry runs: training steps on torch's device "meta", whose tensors have no memory and are counted.

The code that trains runs itself, and csrc/run leaves its kernels out (csrc/bindings/dry.cpp): so nothing describes for
a second time what is kept, and for how long. What libraries and kernels take from the system themselves is not counted.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyglow_fast._core import torch_private
from pyglow_fast._core.backend import require
from pyglow_fast._core.dry import state

M = TypeVar("M", bound=nn.Module)


def without_values(x: Tensor) -> Tensor:
    """A leaf like x for a dry run."""
    return torch.empty_like(x, device="meta", requires_grad=x.requires_grad).detach().requires_grad_(x.requires_grad)


def twin_of(module: M) -> M:
    """A copy of a module for a dry run: its parameters have no values, and drop their gradients as these come.

    It has no hooks.
    """
    memo: dict[int, Any] = {id(buffer): without_values(buffer) for buffer in module.buffers()}
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            memo[id(hooks)] = type(hooks)()
    for own in module.parameters():
        memo[id(own)] = twin = nn.Parameter(without_values(own.detach()), own.requires_grad)
        if own.requires_grad:  # as if it were added to those of an earlier batch, which takes torch ten times as long
            twin.register_post_accumulate_grad_hook(_drop_gradient)
    return copy.deepcopy(module, memo)


def _drop_gradient(tensor: Tensor) -> None:
    tensor.grad = None


@contextlib.contextmanager
def dry_run(device: torch.device) -> Iterator[Any]:
    """A context in which tensors on "meta" stand for ones on a device and are counted, on this thread.

    The count that it gives has the ``most`` bytes so far.
    """
    count = require().DryRun(device.type != "cpu")
    state.device = device
    count.enter()
    try:
        # What looks at values in the caller's ops, gradients and saved tensors is not to see these.
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch_private.without_dispatch_modes(), torch.autograd.set_detect_anomaly(False), hooks:
            yield count
    finally:
        count.exit()
        state.device = None
