"""Couples tokens (N, T, C): a permutation of the tokens or of their channels, then half of them transformed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop.gather import Gather
from pyglow_fast.interop.last_seen import LastSeen
from pyglow_fast.reference import CouplingSpec


class Permutation(NamedTuple):
    """A permutation and its inverse: u[m] = x[order[m]], x[k] = u[back[k]]."""

    order: Tensor
    back: Tensor


def _gathered(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    if not x.requires_grad or not torch.is_grad_enabled():
        return x.index_select(1, order)
    out: Tensor = Gather.apply(x, order, back)
    return out


# The permutations by layer and projection, each with the tensor that it was read from.
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[LastSeen, Permutation | None]]] = (
    weakref.WeakKeyDictionary()
)


def permutation_of(layer: nn.Module, axis: str, projection: Tensor) -> Permutation | None:
    """Read the permutation that u = x P is, P one-hot (M, M); None if P is none.

    The tensor is read once for each of its states, as reading it stops a GPU's stream.
    """
    if projection.is_inference():
        return _read(projection)
    kept = _known.setdefault(layer, {}).get(axis)
    if kept is not None and kept[0].same([projection]):
        return kept[1]
    found = _read(projection)
    _known[layer][axis] = (LastSeen([projection]), found)
    return found


def _read(projection: Tensor) -> Permutation | None:
    square = projection.dim() == 2 and projection.shape[0] == projection.shape[1]
    if not square:
        return None
    ones = projection == 1
    one_hot = (projection != 0).sum() == len(projection) and bool((ones.sum(0) == 1).all() & (ones.sum(1) == 1).all())
    if not one_hot:
        return None
    order = ones.to(torch.uint8).argmax(0)
    return Permutation(order, order.argsort())


class TokenCoupling(NamedTuple):
    """A coupling y = P^-1 (u1, (u2 + shift) s), (u1, u2) = P x, (shift, raw) = net(u1), s = m sigmoid(raw).

    Attributes:
        net: u1 (N, A / 2, B) -> shift, then raw (N, A, B), where x is (N, A, B): A tokens of B channels, or the other
            way round.
        spec: how the coupling scales and shifts.
        by_channel: whether A are the channels, not the tokens.
        permutation: the order of A; None if it is left as it is.

    Shapes: x (N, T, C); log_det (N,), nats. The result may be a transposed view.
    """

    net: Callable[[Tensor], Tensor]
    spec: CouplingSpec
    by_channel: bool
    permutation: Permutation | None

    def halved(self, x: Tensor) -> Tensor:
        """Arrange tokens as u (N, A, B), whose halves along A the coupling takes."""
        u = (x.transpose(1, 2) if self.by_channel else x).contiguous()
        return u if self.permutation is None else _gathered(u, *self.permutation)

    def whole(self, u: Tensor) -> Tensor:
        """Arrange u as tokens again."""
        if self.permutation is not None:
            u = _gathered(u, *reversed(self.permutation))
        return u.transpose(1, 2) if self.by_channel else u

    def net_output(self, u: Tensor) -> Tensor:
        """Run the net on the half that stays as it is."""
        return self.net(u[:, : u.shape[1] // 2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens x to y and log_det = sum log s."""
        u = self.halved(x)
        y, log_det = functional.coupling(u, self.net_output(u), self.spec)
        return self.whole(y), log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens y to x and log_det = -sum log s."""
        u = self.halved(y)
        x, log_det = functional.coupling_inverse(u, self.net_output(u), self.spec)
        return self.whole(x), log_det
