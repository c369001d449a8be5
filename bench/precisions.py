"""The precisions of the benchmarks of nets and models, and how far bfloat16 or TF32 may be off by what rounding does.

A bfloat16 has 8 bits, so that rounding to it is off by at most UNIT = 2^-8 of a number; by ROUNDING in the root mean
square over numbers whose logarithms are spread evenly (the error is even over +-UNIT of the power of two below, and
1 / m^2 has the mean 0.541 over 1 <= m < 2). Roundings of different numbers are independent, so that their squares add,
and a sum of products is relatively as far off as its terms. A result passes if it is off by at most MARGIN times what
follows from that; a wrong formula is off by more.

TF32 is how a GPU may multiply float32 numbers: with 11 bits of each, the others dropped or rounded away, which is off
by at most TF32_UNIT = 2^-10. Products and sums stay float32, so that fewer numbers are rounded than in bfloat16; what
follows for bfloat16 is a bound with that unit, too. What is dropped is of one sign: the product of two such numbers is
too small by 0.36 TF32_UNIT of each in the mean (1 / m has the mean 0.721), and so is a net's output for each of its
2 * layers operands, of which MARGIN holds.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TF32 = "tf32"  # float32 whose convolutions may round to TF32 on a GPU, as torch lets them; elsewhere it is fp32
NAMES = {dtype: name for name, dtype in PRECISIONS.items()}
UNIT = 2.0**-8
TF32_UNIT = 2.0**-10
SPREAD_EVENLY = (0.541 / 3) ** 0.5
ROUNDING = SPREAD_EVENLY * UNIT
MARGIN = 2.0
# How many numbers a step under autocast rounds one after the other: the 1x1 convolution's input, matrix and output; the
# coupling's scale, shift, product and sum; what actnorm gives.
STATE_ROUNDINGS = 8


def dtype_name(dtype: torch.dtype) -> str:
    """Name a precision as the rows do."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """A context of torch.autocast to bfloat16; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """A context in which the library's convolutions on CUDA may round to TF32, or may not, in the whole process."""
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision == TF32  # type: ignore[attr-defined]  # allow_tf32 itself cannot always be read
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """A context in which the library's matrix products on CUDA may round to TF32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision == TF32
    products.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32 = before


def net_error(layers: int, unit: float = UNIT) -> float:
    """Bound the relative error of what a net puts out: its input, the weights and each layer's output are rounded."""
    return SPREAD_EVENLY * unit * (2 * layers + 1) ** 0.5


def masks_error(*errors: float) -> float:
    """Bound the error of a gradient behind relus whose arguments have these relative errors.

    An argument of zero mean that is off by e of its size has another sign with the probability e / pi. There the
    gradient is wrong by all of itself, elsewhere half of it is there: the square of its error is 2 e / pi.
    """
    return (2.0 / math.pi * sum(errors)) ** 0.5


def net_gradient_error(layers: int, unit: float = UNIT) -> float:
    """Bound the error of a net's gradients, each tensor's: the masks, and twice as many roundings as forward."""
    masks = masks_error(*[net_error(layer, unit) for layer in range(1, layers)])
    return math.hypot(masks, 2**0.5 * net_error(layers, unit))


def flow_error(steps: int, raw: float, unit: float = UNIT, layers: int = 3) -> float:
    """Bound the error of a state of about 1 after steps whose nets alone are rounded and put out about ``raw``.

    The bound also holds for log_prob, in nats per dimension, where errors of different values cancel further.
    """
    return steps**0.5 * raw * net_error(layers, unit)


def flow_gradient_error(steps: int, raw: float, unit: float = UNIT) -> float:
    """Bound the error of all gradients of such a flow: those of a net, and what came to it through the others."""
    return net_gradient_error(3, unit) * math.hypot(1.0, steps**0.5 * raw)


def state_error(steps: int, unit: float = UNIT) -> float:
    """Bound the relative error of the state where it is rounded too."""
    return SPREAD_EVENLY * unit * (STATE_ROUNDINGS * steps) ** 0.5


def state_log_prob_error(steps: int, size: float, unit: float = UNIT) -> float:
    """Bound log_prob's error in nats per dimension: the state is rounded, and log-determinants of that size, once."""
    return state_error(steps, unit) + unit * size


def state_gradient_error(steps: int, unit: float = UNIT) -> float:
    """Bound the error of all gradients where the state is rounded: the masks of two hidden layers that read it."""
    return masks_error(*2 * [math.hypot(state_error(steps, unit), net_error(2, unit))])
