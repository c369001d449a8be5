"""The coupling net's forward and backward without autograd: what a backward that recomputes runs for every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import ops


def scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight whose output channels (dimension 0) are multiplied."""
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))


class ExplicitCouplingNet:
    """exp(3 log_gain) (w3 * relu(w2' * relu(w1' * x + b1') + b2') + b3), ActNorms folded in, on the CPU.

    See CouplingNet.

    Args:
        params: of the net, by name.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self.params = params
        self.scales: list[Tensor | None] = []
        self.weights: list[Tensor] = []  # w1', b1', w2', b2', w3, b3, log_gain
        for layer in (1, 2):
            weight, bias, scale = self._parts(layer)
            self.scales.append(scale)
            self.weights += [weight, bias] if scale is None else [scaled(weight, scale), bias * scale]
        self.weights += [params[name] for name in ("conv3.weight", "conv3.bias", "log_gain")]

    def _parts(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, bias and the scale of both, if there is one."""
        weight = self.params[f"conv{layer}.weight"]
        if f"norm{layer}.log_scale" in self.params:
            return weight, self.params[f"norm{layer}.bias"], self.params[f"norm{layer}.log_scale"].exp()
        return weight, self.params[f"conv{layer}.bias"], None

    @property
    def out_channels(self) -> int:
        """The number of channels of the output."""
        return self.weights[4].shape[0]

    @staticmethod
    def _joined(x1: Tensor, cond: Tensor | None) -> Tensor:
        return x1 if cond is None else torch.cat([x1, cond.to(x1.dtype)], dim=1)

    def output(self, x1: Tensor, cond: Tensor | None) -> Tensor:
        """The net's output alone, without what a backward needs."""
        return ops.coupling_net(self._joined(x1, cond), *self.weights, False)[0]

    def forward(self, x1: Tensor, cond: Tensor | None) -> tuple[Tensor, Any]:
        """The output, and what :meth:`backward` takes."""
        x = self._joined(x1, cond)
        net_out, h1, h2 = ops.coupling_net(x, *self.weights, True)
        return net_out, (x, h1, h2)

    def backward(self, kept: Any, grad_out: Tensor, channels: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Gradients of x1 (the first channels), of the condition and, by name, of the parameters that want one."""
        w1, _, w2, _, *last = self.weights
        want = any(parameter.requires_grad for parameter in self.params.values())
        grad_x, *grads = ops.coupling_net_backward(grad_out, *kept, w1, w2, *last, want)
        grad_cond = None
        if grad_x.shape[1] > channels:  # a copy, as one of the two may be kept when the other is not
            grad_x, grad_cond = grad_x[:, :channels], grad_x[:, channels:].contiguous()
        return grad_x, grad_cond, self._unfolded(grads) if want else {}

    def _unfolded(self, grads: list[Tensor]) -> dict[str, Tensor]:
        """From the gradients of the folded weights and biases to those of the parameters."""
        found = dict(zip(("conv3.weight", "conv3.bias", "log_gain"), grads[4:], strict=True))
        for layer, scale in zip((1, 2), self.scales, strict=True):
            grad_weight, grad_bias = grads[2 * layer - 2 : 2 * layer]
            weight, bias, _ = self._parts(layer)
            if scale is None:
                found[f"conv{layer}.weight"], found[f"conv{layer}.bias"] = grad_weight, grad_bias
                continue
            # Of log scale: sum grad' w' = scale (sum grad' w).
            of_log = ((grad_weight * weight).flatten(1).sum(1) + grad_bias * bias) * scale
            found[f"conv{layer}.weight"] = scaled(grad_weight, scale)
            found[f"norm{layer}.bias"] = grad_bias * scale
            found[f"norm{layer}.log_scale"] = of_log
        return {name: grad for name, grad in found.items() if self.params[name].requires_grad}
