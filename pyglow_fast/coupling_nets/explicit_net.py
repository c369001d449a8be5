"""A chain's forward and backward without autograd: what a backward that recomputes runs for every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pyglow_fast import functional, ops
from pyglow_fast.reference import ChainSpec


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight whose output channels (dimension 0) are multiplied."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


class Explicit(Protocol):
    """What a run of a net without autograd is asked for; see :class:`ExplicitNet`."""

    @property
    def out_channels(self) -> int:
        """The number of channels of the output."""

    def output(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """The net's output alone, without what a backward needs."""

    def forward(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """The output, and what :meth:`backward` takes."""

    def backward(self, kept: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Gradients of x1, of the condition and, by name, of the parameters that want one."""


class LayerNames(NamedTuple):
    """What a layer's parameters are called; weight and bias are multiplied by exp(log_scale), if it has one."""

    weight: str
    bias: str
    log_scale: str | None = None


class ExplicitNet:
    """exp(3 log_gain) (w_L * h_(L-1) + b_L), h_l = a_l(w_l' * h_(l-1) + b_l'), scales folded in, on the CPU.

    See :func:`pyglow_fast.reference.net_chain`.

    Args:
        params: of the net, by name.
        layers: the names of those of each layer.
        spec: of the chain.
        gain: the name of log_gain, if there is one.
    """

    def __init__(
        self, params: Mapping[str, Tensor], layers: Sequence[LayerNames], spec: ChainSpec, gain: str | None = None
    ) -> None:
        self.params, self.layers, self.spec = params, layers, spec
        self.scales: list[Tensor | None] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        for layer in layers:
            weight, bias = params[layer.weight], params[layer.bias]
            scale = None if layer.log_scale is None else params[layer.log_scale].exp()
            self.scales.append(scale)
            self.weights.append(weight if scale is None else scaled(weight, scale))
            self.biases.append(bias if scale is None else bias * scale)
        self.gain = gain
        self.log_gain = None if gain is None else params[gain]

    @property
    def out_channels(self) -> int:
        """The number of channels of the output."""
        return self.weights[-1].shape[0]

    def _run(self, x1: Tensor, cond: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        cond = None if cond is None else cond.to(x1.dtype)
        how = (*ops.chain_arguments(self.spec), functional.net_in_half(x1))
        out, kept = ops.net_chain(x1, cond, self.weights, self.biases, self.log_gain, *how, keep)
        return out, kept, (x1, cond, how)

    def output(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """The net's output alone, without what a backward needs."""
        return self._run(x1, cond, False)[0]

    def forward(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """The output, and what :meth:`backward` takes."""
        out, kept, (x1, cond, how) = self._run(x1, cond, True)
        return out, (x1, cond, kept, how)

    def backward(self, kept: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Gradients of x1, of the condition and, by name, of the parameters that want one."""
        x1, cond, hidden, how = kept
        want = any(parameter.requires_grad for parameter in self.params.values())
        bias = self.biases[-1]
        grad_x, *grads = ops.net_chain_backward(
            grad_out, x1, cond, hidden, self.weights, bias, self.log_gain, *how, want
        )
        grad_cond = grads.pop(0) if cond is not None else None
        return grad_x, grad_cond, self._unfolded(grads) if want else {}

    def _unfolded(self, grads: list[Tensor]) -> dict[str, Tensor]:
        """From the gradients of the folded weights and biases to those of the parameters."""
        found = {} if self.gain is None else {self.gain: grads[-1]}
        count = len(self.layers)
        for index, (layer, scale) in enumerate(zip(self.layers, self.scales, strict=True)):
            grad_weight, grad_bias = grads[index], grads[count + index]
            if layer.log_scale is None or scale is None:
                found[layer.weight], found[layer.bias] = grad_weight, grad_bias
                continue
            weight, bias = self.params[layer.weight], self.params[layer.bias]
            # Of log scale: sum grad' w' = scale (sum grad' w).
            found[layer.log_scale] = ((grad_weight * weight).flatten(1).sum(1) + grad_bias * bias) * scale
            found[layer.weight], found[layer.bias] = scaled(grad_weight, scale), grad_bias * scale
        return {name: grad for name, grad in found.items() if self.params[name].requires_grad}
