"""Forward and backward of a chain of layers without autograd, for a backward that recomputes every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pyglow_fast import functional, ops
from pyglow_fast.reference import ChainSpec


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply the output channels (dimension 0) of a weight."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


NetGradients = tuple[Tensor | None, Tensor | None, dict[str, Tensor]]


class Explicit(Protocol):
    """The interface of a net that runs forward and backward without autograd: ExplicitNet, LibraryNet."""

    @property
    def out_channels(self) -> int:
        """The number of channels of the output."""

    def output(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Compute the net's output alone, without what a backward needs."""

    def forward(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """Compute the output, and what :meth:`backward` takes, once."""

    def backward(self, kept: Any, grad_out: Tensor, needs_inputs: bool = True) -> NetGradients:
        """Compute gradients of x1, of the condition and, by name, of the parameters that want one.

        Where neither of the first two is needed they may be None.
        """


class LayerNames(NamedTuple):
    """Names of a layer's parameters; weight and bias are multiplied by exp(power log_scale), if it has one."""

    weight: str
    bias: str
    log_scale: str | None = None
    power: float = 1.0

    def scale_of(self, log_scale: Tensor) -> Tensor:
        """Compute the scale exp(power log_scale), (C,)."""
        return (log_scale if self.power == 1.0 else self.power * log_scale).exp().flatten()


class FoldedLayers:
    """Weights and biases of a chain with its layers' scales multiplied in, and back to gradients of the parameters.

    Args:
        params: of the net, by name.
        layers: the names of those of each layer.
    """

    def __init__(self, params: Mapping[str, Tensor], layers: Sequence[LayerNames]) -> None:
        self.params, self.layers = params, layers
        self.scales: list[Tensor | None] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        for layer in layers:
            weight, bias = params[layer.weight], params[layer.bias]
            scale = None if layer.log_scale is None else layer.scale_of(params[layer.log_scale])
            self.scales.append(scale)
            self.weights.append(weight if scale is None else scaled(weight, scale))
            self.biases.append(bias if scale is None else bias * scale)

    @property
    def out_channels(self) -> int:
        """The number of channels of the output."""
        return self.weights[-1].shape[0]

    def trains(self, *names: str | None) -> bool:
        """Whether one of the parameters of these names wants a gradient."""
        return any(name is not None and self.params[name].requires_grad for name in names)

    def unfolded(
        self, grad_weights: Sequence[Tensor | None], grad_biases: Sequence[Tensor | None]
    ) -> dict[str, Tensor]:
        """Turn gradients of the folded weights and biases into those that the parameters want, by name.

        None stands for a gradient that was not computed; a layer whose scale wants one has it.
        """
        found: dict[str, Tensor | None] = {}
        grads = zip(grad_weights, grad_biases, strict=True)
        for layer, scale, (grad_weight, grad_bias) in zip(self.layers, self.scales, grads, strict=True):
            if layer.log_scale is not None and scale is not None:
                if self.trains(layer.log_scale):
                    assert grad_weight is not None  # see above
                    assert grad_bias is not None
                    weight, bias = self.params[layer.weight], self.params[layer.bias]
                    # Of log scale: sum grad' w' = scale (sum grad' w), times the power.
                    grad = ((grad_weight * weight).flatten(1).sum(1) + grad_bias * bias) * (layer.power * scale)
                    found[layer.log_scale] = grad.reshape(self.params[layer.log_scale].shape)
                grad_weight = None if grad_weight is None else scaled(grad_weight, scale)
                grad_bias = None if grad_bias is None else grad_bias * scale
            found[layer.weight], found[layer.bias] = grad_weight, grad_bias
        return {name: grad for name, grad in found.items() if grad is not None and self.params[name].requires_grad}


class ExplicitNet(FoldedLayers):
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
        super().__init__(params, layers)
        self.spec, self.gain = spec, gain
        self.log_gain = None if gain is None else params[gain]

    def _run(self, x1: Tensor, cond: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        cond = None if cond is None else cond.to(x1.dtype)
        how = (*ops.chain_arguments(self.spec), functional.net_in_half(x1))
        out, kept = ops.net_chain(x1, cond, self.weights, self.biases, self.log_gain, *how, keep)
        return out, kept, (x1, cond, how)

    def output(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """Compute the net's output alone, without what a backward needs."""
        return self._run(x1, cond, False)[0]

    def forward(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """Compute the output, and what :meth:`backward` takes."""
        out, kept, (x1, cond, how) = self._run(x1, cond, True)
        return out, (x1, cond, kept, how)

    def backward(self, kept: Any, grad_out: Tensor, needs_inputs: bool = True) -> NetGradients:
        """Compute gradients of x1 and of the condition, always, and, by name, of the parameters that want one."""
        x1, cond, hidden, how = kept
        want = self.trains(*self.params)
        bias = self.biases[-1]
        grad_x, *grads = ops.net_chain_backward(
            grad_out, x1, cond, hidden, self.weights, bias, self.log_gain, *how, want
        )
        grad_cond = grads.pop(0) if cond is not None else None
        if not want:
            return grad_x, grad_cond, {}
        count = len(self.layers)
        found = self.unfolded(grads[:count], grads[count : 2 * count])
        if self.gain is not None and self.trains(self.gain):
            found[self.gain] = grads[-1]
        return grad_x, grad_cond, found
