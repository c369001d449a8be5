"""Guards against derivatives that are wrong in silence: second ones, and ones with respect to unknown tensors."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.torch_private import (
    add_batch,
    add_old_batch,
    backward_id,
    enter_old_vmap,
    is_batched_tensor,
    is_old_batched_tensor,
    leave_old_vmap,
    level_of,
    outside_of_a_transform,
    remove_batch,
    remove_old_batch,
    unwrapped_if_dead,
)

Backward = Callable[..., tuple[Tensor | None, ...]]
Saved = tuple[Any, ...]  # tensors, and None


class _Final(torch.autograd.Function):
    """Hands gradients on, the first ones of its inputs; the others are what they were computed from."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "double backward: the gradient of a compiled kernel, or of steps whose states or nets are recomputed, "
            'has no derivative; memory="store" with PYGLOW_FORCE_REFERENCE=1 has one'
        )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call function.apply(*args), in eager mode without its search for transforms, which takes as long as all the rest.

    Not within torch.func or forward-mode AD: a kernel has no derivative there, see :mod:`pyglow_fast._core.tracing`.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    return apply_to_plain(
        function, *[unwrapped_if_dead(value) if isinstance(value, Tensor) else value for value in args]
    )


def apply_to_plain(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply an autograd function to tensors that no transform has wrapped, outside of torch.compile."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Rows(threading.local):
    """The index of the gradient row that vmap is on, per thread."""

    now = 0


_rows = _Rows()


def backward_key() -> tuple[int, int]:
    """A key that tells a backward from others through the same graph: the engine's task, the row of a Jacobian."""
    return backward_id(), _rows.now


def _of_each_row(
    backward: Backward, ctx: Any, grads: Sequence[Tensor | None]
) -> tuple[tuple[Tensor | None, ...], Saved]:
    """backward(ctx, saved, *grads), where vmap hands in many rows of gradients at once (of a Jacobian), row by row.

    Kernels know nothing of vmap, and a backward that decides by values cannot go through it. Second, the saved tensors,
    which are read once: hooks of torch.utils.checkpoint, which may run a forward here, allow no more.
    """
    found: list[Any] = []
    if not torch.compiler.is_compiling():
        found = [
            grad for grad in grads if grad is not None and (is_old_batched_tensor(grad) or is_batched_tensor(grad))
        ]
    if not found:
        saved = ctx.saved_tensors
        return backward(ctx, saved, *grads), saved
    grad = found[0]
    add: Callable[..., Tensor] = add_batch
    remove: Callable[..., Tensor] = remove_batch
    outside: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if is_batched_tensor(grad):  # torch.func.vmap
        level, ours = level_of(grad), is_batched_tensor
        outside = outside_of_a_transform()
    else:  # torch.autograd's own: is_grads_batched, torch.autograd.functional
        level, ours = enter_old_vmap() - 1, is_old_batched_tensor
        leave_old_vmap()
        add, remove = add_old_batch, remove_old_batch
    # The size that is given counts for tensors without a batch only.
    rows = [remove(grad, level, 0, 0) if grad is not None and ours(grad) else None for grad in grads]
    count = next(len(row) for row in rows if row is not None)
    with outside:
        saved = ctx.saved_tensors
        pairs, found, before = list(zip(rows, grads, strict=True)), [], _rows.now
        try:
            for i in range(count):
                _rows.now = i
                found.append(backward(ctx, saved, *(grad if row is None else row[i] for row, grad in pairs)))
        finally:
            _rows.now = before
        stacked = [None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True)]
    return tuple(None if part is None else add(part, 0, level) for part in stacked), saved


def differentiable_once(backward: Backward) -> Backward:
    """Decorate ``backward(ctx, saved, *grads)`` of an autograd function so that a second derivative raises.

    torch's once_differentiable raises only where the incoming gradients require one: those of a sum do not, and a
    penalty on such a gradient would then have a derivative of zero, silently.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _of_each_row(backward, ctx, grads)[0]
        with torch.no_grad():
            found, saved = _of_each_row(backward, ctx, grads)
        given = [grad.detach().requires_grad_() for grad in found if grad is not None]
        # A derivative with respect to any of these must meet the refusal too, and not be None or zero.
        sources = [tensor for tensor in (*saved, *grads) if tensor is not None and tensor.requires_grad]
        final = iter(_Final.apply(len(given), *given, *sources))
        return tuple(None if grad is None else next(final) for grad in found)

    return checked


def passed_back(
    outputs: Sequence[Tensor], output_grads: Sequence[Tensor], slots: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Compute the gradients of slots from those of outputs; None where a slot is empty, wants none or is not used."""
    pairs = [(out, grad) for out, grad in zip(outputs, output_grads, strict=True) if out.requires_grad]
    wanted = [slot for slot in slots if slot is not None and slot.requires_grad]
    if not wanted or not pairs:
        return [None] * len(slots)
    outs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, grads, allow_unused=True))
    return [next(found) if slot is not None and slot.requires_grad else None for slot in slots]


def check_leaves(output: Tensor, known: Sequence[Tensor | None], what: str = "net") -> None:
    """Refuse an output of ``what`` through whose graph a gradient would reach other tensors than the known ones."""
    found = [tensor.grad_fn for tensor in known if tensor is not None]
    ends = [node for node in found if node is not None]  # kept: ids are unique among the living
    seen, known_ids = {id(node) for node in ends}, {id(tensor) for tensor in known}
    waiting: list[Any] = [] if output.grad_fn is None else [output.grad_fn]
    visited = []
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        visited.append(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaf = node.variable
            expected = "no tensors that require a gradient but its parameters and inputs"
            expect(id(leaf) in known_ids, what, expected, f"one of shape {tuple(leaf.shape)} in its graph")
        waiting.extend(following for following, _ in node.next_functions if following is not None)
