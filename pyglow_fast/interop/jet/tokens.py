"""One coupling of tokens (N, T, C): a permutation of the tokens or of their channels, then half of them transformed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop.gather import Gather
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.reversible.passes import coupling_backward_from_output


class Permutation(NamedTuple):
    """u[m] = x[order[m]], x[k] = u[back[k]]."""

    order: Tensor
    back: Tensor


def _gathered(x: Tensor, order: Tensor, back: Tensor) -> Tensor:
    if not x.requires_grad or not torch.is_grad_enabled():
        return x.index_select(1, order)
    out: Tensor = Gather.apply(x, order, back)
    return out


# By layer and axis of projection, with the tensor that it was read from: as long as that lives, no other is in its
# place.
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, int, Permutation | None]]] = (
    weakref.WeakKeyDictionary()
)


def permutation_of(layer: nn.Module, axis: str, projection: Tensor) -> Permutation | None:
    """The permutation that u = x P is, P one-hot (M, M); None if P is none.

    Read once for each state of the tensor, as reading it stops a GPU's stream.
    """
    if projection.is_inference():
        return _read(projection)
    kept = _known.setdefault(layer, {}).get(axis)
    if kept is not None:
        same = kept[0].data_ptr() == projection.data_ptr() and kept[0].shape == projection.shape
        if same and kept[0].device == projection.device and kept[1] == projection._version:
            return kept[2]
    found = _read(projection)
    _known[layer][axis] = (projection.detach(), projection._version, found)
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
    """y = P^-1 (u1, (u2 + shift) s), (u1, u2) the halves of u = P x, (shift, raw) = net(u1), s = m sigmoid(raw).

    Attributes:
        net: u1 (N, A / 2, B) -> shift, then raw (N, A, B), where x is (N, A, B): A tokens of B channels, or the other
            way round.
        spec: of the coupling.
        by_channel: A are the channels.
        permutation: of A; None: as they come.

    Shapes: x (N, T, C); log_det (N,), nats. What comes out may be a transposed view.
    """

    net: Callable[[Tensor], Tensor]
    spec: CouplingSpec
    by_channel: bool
    permutation: Permutation | None

    def halved(self, x: Tensor) -> Tensor:
        """u (N, A, B)."""
        u = (x.transpose(1, 2) if self.by_channel else x).contiguous()
        return u if self.permutation is None else _gathered(u, *self.permutation)

    def whole(self, u: Tensor) -> Tensor:
        """The tokens, from u."""
        if self.permutation is not None:
            u = _gathered(u, *reversed(self.permutation))
        return u.transpose(1, 2) if self.by_channel else u

    def net_output(self, u: Tensor) -> Tensor:
        """What the net gives for the half that stays as it is."""
        return self.net(u[:, : u.shape[1] // 2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, log_det = sum log s."""
        u = self.halved(x)
        y, log_det = functional.coupling(u, self.net_output(u), self.spec)
        return self.whole(y), log_det

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """x, log_det = -sum log s."""
        u = self.halved(y)
        x, log_det = functional.coupling_inverse(u, self.net_output(u), self.spec)
        return self.whole(x), log_det

    def backward(
        self, y: Tensor, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From y: x, and the gradients of x (without the net's part) and of net_out."""
        found = coupling_backward_from_output(self.halved(y), net_out, self.halved(grad_y), grad_log_det, self.spec)
        return self.whole(found[0]), self.whole(found[1]), found[2]
