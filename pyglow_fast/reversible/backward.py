"""The backward of a chain of flow steps, from its output and what the forward kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast.coupling_nets.plan import Chunk
from pyglow_fast.coupling_nets.run import Consume
from pyglow_fast.reversible import passes
from pyglow_fast.reversible.drift import Witness, anchor_drift
from pyglow_fast.reversible.walk import Walk

if TYPE_CHECKING:
    from pyglow_fast.reversible.chain import Chain, Kept


class _Parts:
    """A tensor that chunks give part by part; nothing is copied if there is one chunk."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.value: Tensor | None = None

    def put(self, chunk: Chunk, part: Tensor) -> None:
        if part.shape == self.like.shape:
            self.value = part
            return
        if self.value is None:
            self.value = torch.empty_like(self.like)
        chunk.outputs(self.value).copy_(part)

    def get(self) -> Tensor:
        return torch.empty_like(self.like) if self.value is None else self.value


def unbind_indices(indices: Tensor | None, steps: int) -> Sequence[Tensor | None]:
    """Of each step its index, None where the maps are matrices."""
    return [None] * steps if indices is None else indices.unbind()


def _inverses(matrices: Tensor, indices: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """M^-1 of every step, with its index if the maps are gathers."""
    if indices is None:
        return [(inverse, None) for inverse in functional.invert_matrix(matrices).unbind()]
    scales, back = functional.invert_gather(matrices, indices)
    return list(zip(scales.unbind(), back.unbind(), strict=True))


class ChainBackward(Walk):
    """Walks a chain back, or differentiates it from kept states; each net runs once a step, chunk by chunk."""

    def __init__(
        self,
        chain: Chain,
        x: Tensor,
        cond: Tensor | None,
        matrices: Tensor,
        offsets: Tensor,
        indices: Tensor | None,
        params: Sequence[Sequence[Tensor]],
        kept: Kept,
        grad_log_det: Tensor,
        needs_cond: bool,
    ) -> None:
        n = len(chain)
        super().__init__(n, x, kept.anchors, chain.part, kept.lowest)
        self.chain, self.cond, self.params, self.kept = chain, cond, params, kept
        self.matrices, self.offsets = matrices.unbind(), offsets.unbind()
        self.indices = unbind_indices(indices, n)
        self.inverses = [] if kept.states else _inverses(matrices, indices)
        self.grad_log_det, self.needs_cond = grad_log_det, needs_cond
        self.witnesses = Witness.all_of(kept.seen)
        self.grad_matrices: list[Tensor] = [matrices] * n  # placeholders until each is known
        self.grad_offsets: list[Tensor] = [offsets] * n
        self.grad_params: list[tuple[Tensor | None, ...]] = [()] * n

    def run(self, z: Tensor, grad_z: Tensor) -> Tensor:
        """grad_x; the other gradients are attributes."""
        if not self.kept.states:
            return super().run(z, grad_z)
        self.part.whole.checkpointed(self.part.first)
        return self._differentiate(0, self.kept.states, self.x, grad_z)

    def drift(self, k: int, x: Tensor, anchor: Tensor | None) -> Tensor:
        if anchor is None:
            return self.witnesses[k].drift(x, self.matrices[k], self.offsets[k], self.indices[k])
        squeezed = k == 0 and self.chain.squeeze_first
        return anchor_drift(x, functional.squeeze(anchor) if squeezed else anchor)

    def invert(self, k: int, y: Tensor, grad_y: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        """From step k's output: its input, recomputed, and the gradient of it; that uses the true input where known.

        The one run of the net serves the inversion and the differentiation.
        """
        x_parts, grad_u_parts = _Parts(y), _Parts(y)
        spec, (inverse_matrix, inverse_index) = self.chain.specs[k], self.inverses[k]

        def consume(net_out: Tensor, chunk: Chunk) -> Tensor:
            x, grad_u, grad_net_out = passes.step_backward(
                chunk.outputs(y),
                net_out,
                chunk.outputs(grad_y),
                chunk.per_sample(self.grad_log_det),
                inverse_matrix,
                self.offsets[k],
                spec,
                inverse_index,
            )
            x_parts.put(chunk, x)
            grad_u_parts.put(chunk, grad_u)
            return grad_net_out

        added = self._net_backward(k, y, consume, False)
        x = x_parts.get()
        grad_x = self._mix_backward(k, x if anchor is None else anchor, grad_u_parts.get(), added, anchor is not None)
        return x, grad_x

    def _net_backward(self, k: int, state: Tensor, consume: Consume, same_state: bool) -> Tensor:
        arguments = (state[:, : self.chain.kept], self.cond, self.params[k], self.kept.memos[k], consume)
        grad_kept, grad_cond, self.grad_params[k] = self.chain.nets[k].backward(*arguments, self.needs_cond, same_state)
        self.cond_sum.put(grad_cond)
        return grad_kept

    def _mix_backward(self, k: int, x: Tensor, grad_u: Tensor, added: Tensor, is_input: bool) -> Tensor:
        squeezes = k == 0 and is_input and self.chain.squeeze_first
        grad_x, self.grad_matrices[k], self.grad_offsets[k] = passes.channel_mix_backward(
            x, grad_u, self.matrices[k], self.offsets[k], added, squeezes, self.indices[k]
        )
        return grad_x

    def redo(self, first: int, last: int, x: Tensor, grad: Tensor) -> Tensor:
        """Steps first .. last by checkpointing from the true input of the first: the exact gradient of it."""
        squeezes = first == 0 and self.chain.squeeze_first
        u = functional.channel_mix(x, self.matrices[first], self.offsets[first], squeezes, self.indices[first])
        states = [u]
        for k in range(first, last):
            net_out = self.chain.nets[k].repeat(u[:, : self.chain.kept], self.cond, self.params[k], self.kept.memos[k])
            following = self.matrices[k + 1], self.offsets[k + 1]
            u, _ = functional.coupling_mix(u, net_out, *following, self.chain.specs[k], self.indices[k + 1])
            states.append(u)
        return self._differentiate(first, states, x, grad)

    def _differentiate(self, first: int, states: list[Tensor], x: Tensor, grad_z: Tensor) -> Tensor:
        """Given u of every step from `first` on, and the input x of that step: its gradient. Nothing is inverted."""
        grad, added = grad_z, None
        for i in reversed(range(len(states))):
            last = i + 1 == len(states)
            grad, added = self._couple_backward(first + i, states[i], grad, added, last)
        assert added is not None  # a chain has a step
        return self._mix_backward(first, x, grad, added, True)

    def _couple_backward(
        self, k: int, u: Tensor, grad: Tensor, added: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradient of u in two parts, from that of the coupling's output (last) or of the next step's u."""
        grad_u_parts = _Parts(u)
        spec = self.chain.specs[k]
        sums: list[Tensor] = []

        def consume(net_out: Tensor, chunk: Chunk) -> Tensor:
            part, grad_part, grad_log_det = chunk.outputs(u), chunk.outputs(grad), chunk.per_sample(self.grad_log_det)
            if last:
                grad_u, grad_net_out = passes.coupling_backward(part, net_out, grad_part, grad_log_det, spec)
            else:
                grad_u, grad_net_out, *mix = passes.coupling_mix_backward(
                    part,
                    net_out,
                    grad_part,
                    grad_log_det,
                    self.matrices[k + 1],
                    self.offsets[k + 1],
                    spec,
                    None if added is None else chunk.outputs(added),
                    self.indices[k + 1],
                )
                sums[:] = [total + value for total, value in zip(sums, mix, strict=True)] if sums else mix
            grad_u_parts.put(chunk, grad_u)
            return grad_net_out

        grad_kept = self._net_backward(k, u, consume, True)
        if not last:
            self.grad_matrices[k + 1], self.grad_offsets[k + 1] = sums
        return grad_u_parts.get(), grad_kept
