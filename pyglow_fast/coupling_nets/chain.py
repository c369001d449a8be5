"""A coupling net as a chain of layers, which csrc/run computes; see reference.net_chain."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyglow_fast.reference import ChainSpec


class Chain(NamedTuple):
    """A coupling net as the run computes it: w_L * h_(L-1) + b_L, h_l = a_l(w_l * h_(l-1) + b_l).

    Attributes:
        tensors: of each layer weight, bias and, if its power is not 0, log_scale: both are multiplied by
            exp(power log_scale).
        powers: of each layer.
        spec: the activations and dilations.
    """

    tensors: list[Tensor]
    powers: tuple[float, ...]
    spec: ChainSpec

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return sum([tensor.numel() for tensor in self.tensors]) * self.tensors[0].element_size()

    @property
    def last_weight(self) -> Tensor:
        """The weight of the last layer, whose outputs are the net's."""
        return self.tensors[-2 if self.powers[-1] == 0 else -3]
