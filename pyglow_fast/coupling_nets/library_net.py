"""A coupling net of convolutions without autograd, by torch's own ops: the form that nets have on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyglow_fast import convolutions
from pyglow_fast.coupling_nets.explicit_net import FoldedLayers, LayerNames, NetGradients
from pyglow_fast.reference import ChainSpec


class LibraryNet(FoldedLayers):
    """w_L' * h_(L-1) + b_L', h_l = a_l(w_l' * h_(l-1) + b_l'), all scales folded in, by the library's convolutions.

    Images are taken in any memory format; the output is channels-last, and so are the gradients of x1 and of a
    condition. Under autocast the output is of its dtype. See :mod:`pyglow_fast.convolutions`.

    Args:
        params: of the net, by name.
        layers: the names of those of each layer.
        spec: of the chain.
        like: an input: its device and number of dimensions, and autocast as it is now, decide how the weights lie.
    """

    def __init__(
        self, params: Mapping[str, Tensor], layers: Sequence[LayerNames], spec: ChainSpec, like: Tensor
    ) -> None:
        super().__init__(params, layers)
        self.chain = convolutions.prepared(self.weights, self.biases, spec, like)

    def output(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Compute the net's output alone, without what a backward needs."""
        return convolutions.run(self.chain, convolutions.joined(x1, cond))

    def forward(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """Compute the output, and what :meth:`backward` takes, once."""
        kept: list[Tensor] = []
        out = convolutions.run(self.chain, convolutions.joined(x1, cond), kept)
        return out, (convolutions.Source.of(x1, cond), kept)

    def backward(self, kept: Any, grad_out: Tensor, needs_inputs: bool = True) -> NetGradients:
        """Compute gradients of x1, of the condition and, by name, of the parameters that want one; no others."""
        source, hidden = kept
        weights = [self.trains(layer.weight, layer.log_scale) for layer in self.layers]
        biases = [self.trains(layer.bias, layer.log_scale) for layer in self.layers]
        wanted = convolutions.Wanted(needs_inputs, weights, biases)
        grad, *of_layers = convolutions.backward(grad_out, hidden, self.chain.weights, self.chain.spec, wanted)
        grad_x, grad_cond = source.split(grad)
        dtypes = [value.dtype for value in self.weights]
        return grad_x, grad_cond, self.unfolded(*(convolutions.like_parameters(grads, dtypes) for grads in of_layers))
