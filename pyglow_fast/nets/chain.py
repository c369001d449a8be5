"""A coupling net as a chain of layers, which csrc/run computes; see reference.net_chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast.reference import ChainSpec


@dataclass(frozen=True)
class Outputs:
    """The form of a net's output, which a coupling reads as shifts and then raw scales: cap tanh(sign out / cap)."""

    in_turn: bool = False  # its channels alternate: shift, raw scale, shift, ...
    signs: tuple[float, float] = (1.0, 1.0)  # of shift and raw scale
    caps: tuple[float, float] = (0.0, 0.0)  # of both; 0 where there is no bound

    def __call__(self, values: Tensor, dim: int) -> Tensor:
        """Order the channels in dimension ``dim`` of values and give them their signs: one copy, without the bounds."""
        halves = values.unflatten(dim, (-1, 2)).unbind(dim + 1) if self.in_turn else values.tensor_split(2, dim)
        return torch.cat([half * sign for half, sign in zip(halves, self.signs, strict=True)], dim)

    def bounded(self, out: Tensor) -> Tensor:
        """Bound ordered outputs (N, C, *spatial)."""
        if not any(self.caps):
            return out
        halves = zip(out.tensor_split(2, 1), self.caps, strict=True)
        return torch.cat([cap * torch.tanh(half / cap) if cap else half for half, cap in halves], 1)


class Chain(NamedTuple):
    """A coupling net as the run computes it: w_L * h_(L-1) + b_L, h_l = a_l(w_l * h_(l-1) + b_l).

    Weight and bias of a layer whose power is not 0 are multiplied by exp(power log_scale).
    """

    tensors: list[Tensor]  # of each layer weight, bias and, if its power is not 0, log_scale
    powers: tuple[float, ...]
    spec: ChainSpec
    outputs: Outputs = Outputs()  # what a coupling takes of the last layer's

    @property
    def last_weight(self) -> Tensor:
        """The weight of the last layer, whose outputs are the net's."""
        return self.tensors[-2 if self.powers[-1] == 0 else -3]
