"""The precisions of the benchmarks of nets and models, and how far bfloat16 may be off by what its rounding does.

A bfloat16 has 8 bits, so that rounding to it is off by at most UNIT = 2^-8 of a number; by ROUNDING in the root mean
square over numbers whose logarithms are spread evenly (the error is even over +-UNIT of the power of two below, and
1 / m^2 has the mean 0.541 over 1 <= m < 2). Roundings of different numbers are independent, so that their squares add,
and a sum of products is relatively as far off as its terms. A result passes if it is off by at most MARGIN times what
follows from that; a wrong formula is off by more.
"""

from __future__ import annotations

import contextlib
import math

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in PRECISIONS.items()}
UNIT = 2.0**-8
ROUNDING = (0.541 / 3) ** 0.5 * UNIT
MARGIN = 2.0
# Of a step under autocast: the 1x1 convolution's input, matrix and output; the coupling's scale, shift, product and
# sum; what actnorm gives.
STATE_ROUNDINGS = 8


def dtype_name(dtype: torch.dtype) -> str:
    """As rows have it."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """torch.autocast to bfloat16; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def net_error(layers: int) -> float:
    """Of what a net puts out, relative: its input, the weights and the output of each layer are rounded."""
    return ROUNDING * (2 * layers + 1) ** 0.5


def masks_error(*errors: float) -> float:
    """Of a gradient behind relus whose arguments have these relative errors.

    An argument of zero mean that is off by e of its size has another sign with the probability e / pi. There the
    gradient is wrong by all of itself, elsewhere half of it is there: the square of its error is 2 e / pi.
    """
    return (2.0 / math.pi * sum(errors)) ** 0.5


def net_gradient_error(layers: int) -> float:
    """Of the gradients of a net, each tensor's: the masks, and twice as many roundings as forward."""
    masks = masks_error(*[net_error(layer) for layer in range(1, layers)])
    return math.hypot(masks, 2**0.5 * net_error(layers))


def flow_error(steps: int, raw: float, layers: int = 3) -> float:
    """Of the state after steps whose nets alone are rounded and put out about ``raw``; the state is about 1.

    Also of log_prob, in nats per dimension, where errors of different values cancel further.
    """
    return steps**0.5 * raw * net_error(layers)


def flow_gradient_error(steps: int, raw: float) -> float:
    """Of all gradients of such a flow together: those of a net, and of what came to it through the others."""
    return net_gradient_error(3) * math.hypot(1.0, steps**0.5 * raw)


def state_error(steps: int) -> float:
    """Of the state, relative, where it is rounded too."""
    return ROUNDING * (STATE_ROUNDINGS * steps) ** 0.5


def state_log_prob_error(steps: int, size: float) -> float:
    """Of log_prob in nats per dimension, where the state is rounded and log-determinants of that size are, once."""
    return state_error(steps) + UNIT * size


def state_gradient_error(steps: int) -> float:
    """Of all gradients where the state is rounded: the masks of two hidden layers that read it."""
    return masks_error(*2 * [math.hypot(state_error(steps), net_error(2))])
