"""Convolution chains by the library's own ops, forward and backward without autograd; see reference.net_chain.

What lies between layers is kept once, behind its activation, and freed by the backward as it passes. Images are run
channels-last from end to end: the input, the weights, every hidden layer, the output and all gradients. That this is
the faster form on a GPU, whose tensor cores multiply channels-last numbers, is a prediction that no GPU has confirmed
yet. Contiguous are other numbers of dimensions, and float64 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast import ops
from pyglow_fast._dry import device_of
from pyglow_fast._errors import expect
from pyglow_fast.reference import Activation, ChainSpec, activated, autocast_is_on, sides

_aten = torch.ops.aten
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of cuDNN's convolution with a relu
MOST_ELEMENTS = 2**31 - 1  # of a tensor whose elements cuDNN counts with 32 bits
_without_engine: set[tuple[object, ...]] = set()  # convolutions that cuDNN has refused to fuse


def dtype_on(x: Tensor) -> torch.dtype:
    """The dtype that a net computes in, given its input: under autocast that of the moment, where x is float32."""
    device_type = device_of(x).type
    return (
        torch.get_autocast_dtype(device_type) if x.dtype == torch.float32 and autocast_is_on(device_type) else x.dtype
    )


def format_for(x: Tensor) -> torch.memory_format:
    """The memory format that a chain is run in, given one of its tensors."""
    on_gpu = x.device.type == "cuda"
    images = x.dim() == 4 and not (on_gpu and x.dtype == torch.float64)  # which cuDNN takes contiguous only
    return torch.channels_last if images else torch.contiguous_format


class Chain(NamedTuple):
    """The layers of a chain, ready to run: weights in their dtype and memory format, without a gain."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    spec: ChainSpec


class Wanted(NamedTuple):
    """Which gradients of a chain are to be computed: that of the input, and by layer of the weights and the biases."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]


class Source(NamedTuple):
    """The tensors that a chain's input was made of: so many channels of x, and a condition if it has a dtype."""

    channels: int
    dtype: torch.dtype
    cond_dtype: torch.dtype | None

    @classmethod
    def of(cls, x: Tensor, cond: Tensor | None) -> Source:
        """Describe the source that x and cond side by side are."""
        return cls(x.shape[1], x.dtype, None if cond is None else cond.dtype)

    def split(self, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Cut the gradient of the input into those of x and cond, each in its own dtype."""
        if grad is None:
            return None, None
        if self.cond_dtype is None:
            return grad.to(self.dtype), None
        return grad[:, : self.channels].to(self.dtype), grad[:, self.channels :].to(self.cond_dtype)


def prepared(weights: Sequence[Tensor], biases: Sequence[Tensor], spec: ChainSpec, x: Tensor) -> Chain:
    """Bring the layers into the form in which a run on x takes them.

    Under autocast parameters of any dtype are cast; else one that is not of x's dtype is refused when it is used.
    """
    dtype, memory_format = dtype_on(x), format_for(x)
    if dtype != x.dtype:
        weights, biases = [value.to(dtype) for value in weights], [value.to(dtype) for value in biases]
    return Chain([weight.contiguous(memory_format=memory_format) for weight in weights], biases, spec)


def joined(x: Tensor, cond: Tensor | None) -> Tensor:
    """Join x and cond side by side, in the dtype and memory format that a chain is run in.

    Raises:
        ValueError: a condition of another batch, other spatial sizes or on another device than x.
    """
    dtype, memory_format = dtype_on(x), format_for(x)
    if cond is None:
        return x.to(dtype, memory_format=memory_format).contiguous(memory_format=memory_format)
    channels = x.shape[1]
    fits = cond.dim() == x.dim() and (cond.shape[0], *cond.shape[2:]) == (x.shape[0], *x.shape[2:])
    if not (fits and cond.device == x.device):  # a copy would broadcast it, or move it
        expected = f"({x.shape[0]}, Cc, {', '.join(map(str, x.shape[2:]))}) on {x.device}, like x"
        expect(False, "cond", expected, f"{tuple(cond.shape)} on {cond.device}")
    shape = (x.shape[0], channels + cond.shape[1], *x.shape[2:])
    both = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
    both[:, :channels].copy_(x)
    both[:, channels:].copy_(cond)
    return both


_Arguments = tuple[list[int], list[int], list[int], bool, list[int], int]


def _arguments(weight: Tensor, dilation: Sequence[int]) -> _Arguments:
    """Stride, padding, dilation, transposed, output_padding and groups of a convolution that keeps the size."""
    dims = len(dilation)
    return [1] * dims, list(sides(weight.shape[2:], dilation)), list(dilation), False, [0] * dims, 1


def _is_relu(activation: Activation) -> bool:
    return activation.function == "relu" or (activation.function == "leaky_relu" and not activation.parameter)


def _keeps_argument(activation: Activation) -> bool:
    """Whether its derivative takes the argument, and not the value."""
    return ops.ACTIVATION_CODES[activation.function] in ops.KEEPS_INPUT


def cudnn_fuses(h: Tensor, weight: Tensor) -> bool:
    """Tells whether cuDNN is to compute a convolution of images h and the relu behind it as one.

    Not where its algorithms are to be deterministic, which that op does not see to.
    """
    backend = torch.backends.cudnn
    if h.device.type != "cuda" or h.dim() != 4 or h.dtype not in FUSED_DTYPES or torch.version.hip is not None:
        return False
    if not (backend.enabled and backend.is_available()):
        return False
    if backend.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    return max(h.numel(), h.numel() // max(1, h.shape[1]) * weight.shape[0]) <= MOST_ELEMENTS


def _relu_convolution(h: Tensor, weight: Tensor, bias: Tensor, arguments: _Arguments) -> Tensor:
    """relu(w * h + b), in one kernel where cuDNN has one."""
    key = (h.dtype, h.shape, weight.shape, *arguments[2])
    if cudnn_fuses(h, weight) and key not in _without_engine:
        try:
            fused: Tensor = _aten.cudnn_convolution_relu(h, weight, bias, *arguments[:3], 1)
            return fused
        except RuntimeError as error:
            if "unable to find an engine" not in str(error):
                raise
            _without_engine.add(key)  # to ask again would take as long each time
    out: Tensor = _aten.convolution(h, weight, bias, *arguments)
    return out.relu_()


def run(chain: Chain, h: Tensor, kept: list[Tensor] | None = None) -> Tensor:
    """w_L * h_(L-1) + b_L, h_l = a_l(w_l * h_(l-1) + b_l), of h = h_0 as :func:`joined` makes it; no record.

    Args:
        chain: the layers.
        h: (N, C_in, *spatial).
        kept: takes what :func:`backward` needs: h, and of each hidden layer its output, or where the activation's
            derivative takes its argument that before the output.

    Returns:
        (N, C_L, *spatial), of the dtype and memory format of h.
    """
    activations = chain.spec.activations
    for index, (weight, bias, dilation) in enumerate(zip(*chain[:2], chain.spec.dilations, strict=True)):
        if kept is not None:
            kept.append(h)
        arguments = _arguments(weight, dilation)
        if index < len(activations) and _is_relu(activations[index]):
            h = _relu_convolution(h, weight, bias, arguments)
            continue
        h = _aten.convolution(h, weight, bias, *arguments)
        if index < len(activations):
            if kept is not None and _keeps_argument(activations[index]):
                kept.append(h)
            h = activated(h, activations[index])
    return h.contiguous(memory_format=format_for(h))


# By the function, (gradient, value, parameter) -> gradient; the value is the argument where that is kept.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": lambda grad, out, _: grad,
    "leaky_relu": lambda grad, out, leak: _aten.leaky_relu_backward(grad, out, leak, True),
    "silu": lambda grad, argument, _: _aten.silu_backward(grad, argument),
    "gelu": lambda grad, argument, _: _aten.gelu_backward(grad, argument, approximate="none"),
    "gelu_tanh": lambda grad, argument, _: _aten.gelu_backward(grad, argument, approximate="tanh"),
    "elu": lambda grad, out, alpha: _aten.elu_backward(grad, alpha, 1.0, 1.0, True, out),
    "tanh": lambda grad, out, _: _aten.tanh_backward(grad, out),
    "sigmoid": lambda grad, out, _: _aten.sigmoid_backward(grad, out),
}


def _through(activation: Activation, grad: Tensor, value: Tensor) -> Tensor:
    """The gradient before an activation, from the one behind it, which is written over if it is a relu."""
    if _is_relu(activation):
        before: Tensor = _aten.threshold_backward.grad_input(grad, value, 0, grad_input=grad)
        return before
    return _DERIVATIVES[activation.function](grad, value, activation.parameter)


def backward(
    grad_out: Tensor, kept: list[Tensor], weights: Sequence[Tensor], spec: ChainSpec, wanted: Wanted
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Compute the gradients of :func:`run`: of the input, the weights and the biases, None for what is not wanted.

    Args:
        grad_out: that of the output, in any dtype and memory format.
        kept: by ``run``. It is taken from, so that each tensor is freed behind its last use if nobody else has it.
        weights: of the chain that was run.
        spec: of the chain.
        wanted: computed is only what these need.
    """
    last = len(weights) - 1
    of_weights: list[Tensor | None] = [None] * len(weights)
    of_biases = list(of_weights)
    grad: Tensor | None = grad_out.to(kept[0].dtype).contiguous(memory_format=format_for(kept[0]))
    for index in range(last, -1, -1):
        goes_on = wanted.x or any(wanted.weights[:index]) or any(wanted.biases[:index])
        mask = [goes_on, wanted.weights[index], wanted.biases[index]]
        h, weight = kept.pop(), weights[index]
        arguments = _arguments(weight, spec.dilations[index])
        grad, of_weights[index], of_biases[index] = _aten.convolution_backward(
            grad, h, weight, [weight.shape[0]] if mask[2] else None, *arguments, mask
        )
        if index == 0 or grad is None:
            break
        activation = spec.activations[index - 1]
        if _keeps_argument(activation):
            h = kept.pop()
        grad = _through(activation, grad, h)
        del h
    return grad, of_weights, of_biases


def like_parameters(grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype]) -> list[Tensor | None]:
    """Bring gradients of weights or biases into the form of these parameters' gradients: their dtypes, contiguous."""
    found = zip(grads, dtypes, strict=True)
    contiguous = torch.contiguous_format
    return [None if grad is None else grad.to(dtype, memory_format=contiguous) for grad, dtype in found]
