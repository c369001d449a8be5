"""A coupling net as a chain of layers, which csrc/run computes; see reference.net_chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast.reference import ChainSpec


@dataclass(frozen=True)
class Outputs:
    """How a net gives what a coupling takes, all shifts and then all raw scales: cap tanh(sign out / cap).

    Attributes:
        in_turn: its channels alternate: shift, raw scale, shift, ...
        signs: of shift and raw scale.
        caps: of both; 0 where there is no bound.
    """

    in_turn: bool = False
    signs: tuple[float, float] = (1.0, 1.0)
    caps: tuple[float, float] = (0.0, 0.0)

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

    Attributes:
        tensors: of each layer weight, bias and, if its power is not 0, log_scale: both are multiplied by
            exp(power log_scale).
        powers: of each layer.
        spec: the activations and dilations.
        outputs: what a coupling takes of the last layer's.
    """

    tensors: list[Tensor]
    powers: tuple[float, ...]
    spec: ChainSpec
    outputs: Outputs = Outputs()

    @property
    def last_weight(self) -> Tensor:
        """The weight of the last layer, whose outputs are the net's."""
        return self.tensors[-2 if self.powers[-1] == 0 else -3]
