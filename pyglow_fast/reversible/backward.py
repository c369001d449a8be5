"""Backward of a chain of flow steps, from its output and what the forward kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast.coupling_nets.masks import mask_of
from pyglow_fast.coupling_nets.plan import Chunk
from pyglow_fast.coupling_nets.run import Consume
from pyglow_fast.reversible import passes
from pyglow_fast.reversible.drift import anchor_drift, before_map, norms, project, projected_drift, witness_drift
from pyglow_fast.reversible.maps import MapsOfPart
from pyglow_fast.reversible.walk import Measure, Walk

if TYPE_CHECKING:
    from pyglow_fast.reversible.chain import Chain, Kept
    from pyglow_fast.reversible.trail import KnownStates


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


class ChainBackward(Walk):
    """Walks a part of a chain back, or differentiates it from kept states; each net runs once a step, in chunks.

    Args:
        chain: the part.
        x: the input of its first step, None where that is not kept.
        cond: what the nets get besides, or None.
        maps: of its steps, folded, which also take their gradients.
        params: of the nets, by step.
        kept: by the forward.
        needs_cond: the gradient of cond is wanted.
        grad_log_det: (N,); None where nothing is differentiated.
        restored: gives x, and in how many steps, from the anchor before the part; None where nothing is redone.
    """

    def __init__(
        self,
        chain: Chain,
        x: Tensor | None,
        cond: Tensor | None,
        maps: MapsOfPart,
        params: Sequence[Sequence[Tensor]],
        kept: Kept,
        needs_cond: bool,
        grad_log_det: Tensor | None = None,
        restored: Callable[[], tuple[Tensor, int]] | None = None,
    ) -> None:
        n = len(chain)
        super().__init__(n, x, kept.anchors, chain.part, kept.lowest)
        self.chain, self.cond, self.maps, self.params, self.kept = chain, cond, maps, params, kept
        self.matrices, self.offsets, self.indices = maps.matrices, maps.offsets, maps.indices
        self._grad_log_det, self.needs_cond, self._restored = grad_log_det, needs_cond, restored
        self.grad_params: list[tuple[Tensor | None, ...]] = [()] * n

    @property
    def grad_log_det(self) -> Tensor:
        """The gradient of the part's log_det, (N,)."""
        assert self._grad_log_det is not None  # else nothing is differentiated
        return self._grad_log_det

    def run(self, z: Tensor, grad_z: Tensor) -> Tensor:
        """Compute the gradient of x from that of z; all other gradients become attributes."""
        if not self.kept.states:
            return super().run(z, grad_z)
        self.part.whole.checkpointed(self.part.first, z.device)
        assert self.x is not None  # where all states are kept, those between the parts are too
        return self._differentiate(0, self.kept.states, self.x, grad_z)

    def continued(self, known: KnownStates, grad_z: Tensor) -> Tensor:
        """Do what :meth:`run` does, where a drift behind this part has made its last states known."""
        self.n_steps = known.first
        grad = self._differentiate(known.first, known.states, known.x, grad_z)
        self.cond_sum.close()
        return super().run(known.x, grad)

    def measure(self, k: int, x: Tensor, anchor: Tensor | None) -> Measure:
        if anchor is not None:
            squeezed = k == 0 and self.chain.squeeze_first
            return anchor_drift(x, functional.squeeze(anchor) if squeezed else anchor)
        if k > 0 or self.kept.sketch is None:
            return project(x), norms(x)
        (inverse, index), mask = self.maps.inverse(k), self._mask()
        return witness_drift(x, before_map(self.kept.sketch, x, inverse, self.offsets[k], index, mask))

    def drift(self, first: int, x: Tensor, measures: Sequence[Measure]) -> Tensor:
        errors = [error for error in measures if isinstance(error, Tensor)]  # at most one, of the first step
        pairs = [pair for pair in measures if isinstance(pair, tuple)]
        if pairs and self.kept.seen is not None:
            steps = slice(first + len(errors), first + len(measures))
            seen, (inverse, index) = self.kept.seen[steps], self.maps.inverse(steps)
            expected = before_map(seen, x, inverse, self.maps.offset(steps), index, self._mask())
            found, norm = (torch.stack(part) for part in zip(*pairs, strict=True))
            errors.append(projected_drift(found, norm, expected))
        return torch.stack(errors).amax()

    def _mask(self) -> Tensor | None:
        return mask_of(self.cond) if self.chain.masked and self.cond is not None else None

    def invert(self, k: int, y: Tensor, grad_y: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Recompute step k's input from its output, and the gradient of it; that uses the true input where known.

        The one run of the net serves the inversion and the differentiation.
        """
        x_parts, grad_u_parts = _Parts(y), _Parts(y)
        spec, (inverse_matrix, inverse_index) = self.chain.specs[k], self.maps.inverse(k)

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
        x = self.chain.masked_state(x_parts.get(), self.cond)
        grad_x = self._mix_backward(k, x if anchor is None else anchor, grad_u_parts.get(), added, anchor is not None)
        return x, grad_x

    def _read(self, k: int, state: Tensor) -> Tensor:
        """What the step's net reads of a state."""
        return state[:, : self.chain.nets[k].reads(state.shape[1])]

    def _net_backward(self, k: int, state: Tensor, consume: Consume, same_state: bool) -> Tensor | None:
        arguments = (self._read(k, state), self.cond, self.params[k], self.kept.memos[k], consume)
        grad_kept, grad_cond, self.grad_params[k] = self.chain.nets[k].backward(*arguments, self.needs_cond, same_state)
        self.cond_sum.put(grad_cond)
        return grad_kept

    def _mix_backward(self, k: int, x: Tensor, grad_u: Tensor, added: Tensor | None, is_input: bool) -> Tensor:
        squeezes = k == 0 and is_input and self.chain.squeeze_first
        grad_x, *of_map = passes.channel_mix_backward(
            x, grad_u, self.matrices[k], self.offsets[k], added, squeezes, self.indices[k]
        )
        self.maps.put(k, *of_map)
        return grad_x

    def redo(self, first: int, last: int, x: Tensor | None, grad: Tensor) -> Tensor:
        """Compute the exact gradient of steps first .. last; if x is unknown, earlier parts learn their states too."""
        if x is None:
            assert self._restored is not None  # of a backward that differentiates
            x, redone = self._restored()
            self.redone += redone
        return self._differentiate(first, self.states(first, last, x), x, grad)

    def states(self, first: int, last: int, x: Tensor) -> list[Tensor]:
        """List u of steps first .. last, computed forward from the true input of the first."""
        squeezes = first == 0 and self.chain.squeeze_first
        u = functional.channel_mix(x, self.matrices[first], self.offsets[first], squeezes, self.indices[first])
        u = self.chain.masked_state(u, self.cond)
        states = [u]
        for k in range(first, last):
            net_out = self._repeated(k, u)
            following = self.matrices[k + 1], self.offsets[k + 1]
            u, _ = functional.coupling_mix(u, net_out, *following, self.chain.specs[k], self.indices[k + 1])
            u = self.chain.masked_state(u, self.cond)
            states.append(u)
        return states

    def output(self, u: Tensor) -> Tensor:
        """Compute the part's output from the state u of its last step."""
        k = len(self.chain) - 1
        return functional.coupling(u, self._repeated(k, u), self.chain.specs[k])[0]

    def _repeated(self, k: int, u: Tensor) -> Tensor:
        return self.chain.nets[k].repeat(self._read(k, u), self.cond, self.params[k], self.kept.memos[k])

    def _differentiate(self, first: int, states: list[Tensor], x: Tensor, grad_z: Tensor) -> Tensor:
        """Given u of every step from `first` on, and the input x of that step: its gradient. Nothing is inverted."""
        grad: Tensor = grad_z
        added: Tensor | None = None
        for i in reversed(range(len(states))):
            last = i + 1 == len(states)
            grad, added = self._couple_backward(first + i, states[i], grad, added, last)
        return self._mix_backward(first, x, grad, added, True)

    def _couple_backward(
        self, k: int, u: Tensor, grad: Tensor, added: Tensor | None, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of u in two parts, from that of the coupling's output (last) or of the next step's u.

        The second, the net's, is None where the net reads nothing of u.
        """
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
            self.maps.put(k + 1, *sums)
        return grad_u_parts.get(), grad_kept
