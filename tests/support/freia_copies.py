"""Blocks with the interface of AllInOneBlock, as other code bases have copies of it: right ones and wrong ones.

``Block`` is a copy of FrEIA's source in a module of its own, as anomalib has one; ``LaterBlock`` computes what FrEIA's
git does since August 2023. The others differ in one thing that a probe must find.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

import FrEIA.modules as Fm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COPY: dict[str, Any] = {**vars(sys.modules[Fm.AllInOneBlock.__module__]), "__name__": __name__}
with warnings.catch_warnings(action="ignore"):  # of escapes in its docstring
    exec(inspect.getsource(Fm.AllInOneBlock), _COPY)


def tenth_softplus(a: Tensor) -> Tensor:
    return 0.1 * F.softplus(a, beta=0.5)


class Block(_COPY["AllInOneBlock"]):  # type: ignore[misc]
    """z = R (a coupling(R0 x) + b), with log s = clamp tanh(raw(s_net) / 10)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.global_scale_activation = tenth_softplus  # which can be pickled, as anomalib's and not as FrEIA's

    def raw(self, s: Tensor) -> Tensor:
        return s

    def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> Any:
        s, shift = a.tensor_split([x.shape[1]], dim=1)
        return super()._affine(x, torch.cat([self.raw(s), shift], dim=1), rev)


class LaterBlock(Block):
    """A block with indices for a hard permutation, and another clamp."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not options.get("permute_soft"):
            order = self.w_perm.flatten(1).argmax(1)
            self.permute_function = lambda x, order: x[:, order]
            self.w_perm = nn.Parameter(order, requires_grad=False)
            self.w_perm_inv = nn.Parameter(order.argsort(), requires_grad=False)

    def raw(self, s: Tensor) -> Tensor:
        return s / self.clamp


class Sized(LaterBlock):
    """A block for images of one size, as FrEIA's git has it."""

    def raw(self, s: Tensor) -> Tensor:
        if tuple(s.shape[2:]) != tuple(self.dims_in[0][1:]):
            raise RuntimeError(f"Expected input of shape {self.dims_in[0]}")
        return super().raw(s)


def counted(self: Any, s: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return s


# Blocks with another clamp, a side effect, other gradients, or another value in one of the modes.
WRONG: dict[str, type[nn.Module]] = {
    name: type(name, (base,), {"raw": raw})
    for name, base, raw in (
        ("AtanClamp", Block, lambda self, s: 10.0 * torch.atanh(0.636 * torch.atan(0.1 * s))),
        ("Counting", Block, counted),
        ("Detached", Block, lambda self, s: s.detach() + 0.5 * (s - s.detach())),
        ("InTraining", Block, lambda self, s: 1.001 * s if self.training else s),
        ("InEvaluation", Sized, lambda self, s: Sized.raw(self, s if self.training else 1.001 * s)),
    )
}
