"""Runs of a coupling net chunk by chunk: forward without a record, and backward that recomputes a chunk at a time.

Cutting is exact. Output rows [a, b) are computed from input rows [a - halo, b + halo), as far as the image reaches. At
a cut inside the image the net pads where it should not, which spoils at most ``halo`` rows, the ones that are dropped.
At the image's border the strip ends where the image ends and the net's own padding acts as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyglow_fast._core.derivatives import check_leaves, passed_back
from pyglow_fast._core.errors import expect
from pyglow_fast.functional.ops import memory_format_of
from pyglow_fast.nets.plan import Chunk
from pyglow_fast.nets.state import without_autocast_cache
from pyglow_fast.nets.traits import may_write

NetCall = Callable[[Tensor, Tensor | None], Tensor]  # (x1, cond) -> net output
Consume = Callable[[Tensor, Chunk], Tensor]  # (net output of the chunk, chunk) -> its gradient


def inputs_for(net: nn.Module, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, ...]:
    """Give the inputs of a net, x1 and cond if there is one: copies where the net may write to its inputs.

    The half that a net reads is a part of the state, and often of the caller's tensor. A net that begins with
    ``ReLU(inplace=True)`` would change it before the coupling passes it on.
    """
    inputs = (x1,) if cond is None else (x1, cond)
    return tuple(given.clone() for given in inputs) if may_write(net) else inputs


def condition_for(x: Tensor, cond: Tensor | None) -> Tensor:
    """Check that the condition has the samples and positions of x (N, C, *spatial), and cast it to its dtype."""
    expected = f"a tensor of shape ({x.shape[0]}, C_cond, {', '.join(map(str, x.shape[2:]))})"
    expect(isinstance(cond, Tensor), "cond", expected, type(cond).__name__)
    assert cond is not None  # for the type checker: refused above
    fits = cond.dim() == x.dim() and cond.shape[0] == x.shape[0] and cond.shape[2:] == x.shape[2:]
    expect(fits, "cond", expected, f"shape {tuple(cond.shape)}")
    expect(cond.device == x.device, "cond", f"device {x.device} (that of the state)", cond.device)
    return cond.to(x.dtype)


class Tiles:
    """A tensor that chunks give part by part, of the batch and the positions of another; one chunk is not copied."""

    def __init__(self, like: Tensor) -> None:
        self._like = self.value = like

    def put(self, chunk: Chunk, part: Tensor) -> None:
        """Take what a chunk gives; the first one's dtype, channels and memory format are those of the whole."""
        if chunk.whole:
            self.value = part
            return
        if self.value is self._like:
            shape = (self._like.shape[0], part.shape[1], *self._like.shape[2:])
            self.value = part.new_empty(shape).to(memory_format=memory_format_of(part))
        chunk.outputs(self.value).copy_(part)


@torch.no_grad()
def run_net(call: NetCall, x1: Tensor, cond: Tensor | None, plan: Sequence[Chunk]) -> Tensor:
    """Compute call(x1, cond) chunk by chunk without recording a gradient, equal to the plain call up to rounding.

    ``call`` gives the samples and positions of the x1 (N, C1, *spatial) it gets. Returns (N, C_out, *spatial), of the
    dtype that the net gives, and in the memory format of its first chunk.
    """
    net_out = Tiles(x1)
    with without_autocast_cache():
        for chunk in plan:
            net_out.put(chunk, chunk.crop(call(chunk.inputs(x1), None if cond is None else chunk.inputs(cond))))
    return net_out.value


class GradientSum:
    """A sum of gradients in their order, written only to memory of its own: what is added may share memory.

    The result has the ``dtype``, None for that of what is added; sums of 16 bits are in float32.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._total: Tensor | None = None
        self._owned = False

    def add(self, gradient: Tensor | None) -> None:
        """Add one gradient more; None adds nothing."""
        if gradient is None:
            return
        if self._total is None:
            self._total = gradient
        elif self._owned:
            self._total += gradient
        else:  # autograd may have given one tensor as the gradient of two parameters: it is not written to
            wide = torch.float32 if self._dtype in (torch.float16, torch.bfloat16) else self._dtype
            self._total, self._owned = (self._total if wide is None else self._total.to(wide)) + gradient, True

    def result(self) -> Tensor | None:
        """Give the sum, None if nothing was added."""
        return self._total if self._total is None or self._dtype is None else self._total.to(self._dtype)


@torch.no_grad()
def run_net_backward(
    call: NetCall,
    x1: Tensor,
    cond: Tensor | None,
    plan: Sequence[Chunk],
    consume: Consume,
    params: Sequence[Tensor],
    *,
    needs_x1: bool = True,
    needs_cond: bool = True,
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor | None, ...]]:
    """d sum(net_out grad_out) / d (x1, cond, params), the net run again, one chunk and one small graph at a time.

    ``consume`` gets each chunk's net output as it comes and says what its gradient is: so one run of the net serves the
    inversion of a coupling and its differentiation. Nothing is accumulated into ``.grad``, no hooks run.

    Args:
        call: runs the net on a chunk of x1 and cond.
        x1: (N, C1, *spatial), detached or not: only values count.
        cond: (N, Cc, *spatial) or None.
        plan: that of the forward, so that random numbers are drawn in the same order.
        consume: (net_out, chunk) -> grad_out of the same shape, any floating dtype; net_out is without gradient and
            must not be written to.
        params: that ``call`` uses; those that require no gradient get none.
        needs_x1, needs_cond: whether these gradients are wanted.

    Returns:
        grad_x1 and grad_cond (zeros if the net does not use them, None where not wanted or without a condition), and
        the gradients of params (None for those not used), summed in the order of the chunks. These are not to be
        written to: as autograd's gradients they may share memory with each other and with grad_out.

    Raises:
        ValueError: the net uses a tensor that requires a gradient and is not in params.
    """

    def gradients(chunk: Chunk) -> list[Tensor | None]:
        """Compute the gradients of x1, cond and params for one chunk; its graph ends with the call."""
        leaf = chunk.inputs(x1).detach().requires_grad_(needs_x1)
        cond_leaf = None if cond is None else chunk.inputs(cond).detach().requires_grad_(needs_cond)
        with torch.enable_grad():
            net_out = chunk.crop(call(leaf, cond_leaf))
        slots = [leaf, cond_leaf, *params]
        if chunk is plan[0]:
            check_leaves(net_out, slots)
        grad_out = consume(net_out.detach(), chunk)
        return passed_back([net_out], [grad_out], slots)

    whole = (x1 if needs_x1 else None, cond if needs_cond else None)
    totals = [None if like is None else torch.zeros_like(like) for like in whole]  # halos of strips overlap
    sums = [GradientSum(parameter.dtype) for parameter in params]

    def add(chunk: Chunk) -> None:
        """A call, so that the gradients of one chunk are freed before those of the next are there."""
        found = gradients(chunk)
        for total, gradient in zip(totals, found[:2], strict=True):
            if total is not None and gradient is not None:
                chunk.inputs(total).add_(gradient)
        for accumulated, gradient in zip(sums, found[2:], strict=True):
            accumulated.add(gradient)

    with without_autocast_cache():
        for chunk in plan:
            add(chunk)
    return totals[0], totals[1], tuple(accumulated.result() for accumulated in sums)
