"""The cases that the kernels are tested on, and the comparison with the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyglow_fast import functional, reference
from pyglow_fast.reference import ORDERS, CouplingSpec
from support.helpers import assert_kernel_close

DTYPES = [torch.float32, torch.float64]
# (N, C, *spatial): H != W, P no multiple of a vector or tile, several tiles, more tiles than the slots of the sums over
# them (32, of moments 256) and no multiple of those, odd and large C, no and single samples and positions, 1-d and 3-d
# data, vectors.
SHAPES = [
    (2, 12, 8, 8),
    (3, 5, 7, 3),
    (1, 12, 40, 33),
    (2, 48, 16, 12),
    (2, 96, 4, 4),
    (1, 130, 3, 5),
    (3, 2, 1, 1),
    (2, 1, 9),
    (4, 6, 700),
    (300, 3, 2),
    (2, 4, 3, 4, 5),
    (5, 3),
    (0, 4, 4, 4),
    (2, 4, 0, 3),
    (2, 4, 3, 0),
    (2, 4, 2, 0, 3),
    (2, 0, 3, 3),
]
SPECS = [
    CouplingSpec("affine", scale_map, 2.0, eps, 1.5, order)
    for scale_map, eps in (("sigmoid", 0.0), ("sigmoid", 0.05), ("exp", 0.0), ("tanh", 0.0), ("atan", 0.0))
    for order in ORDERS
]
SPECS += [CouplingSpec("additive"), *(CouplingSpec(bias=0.0, factor=2.0, order=order) for order in ORDERS)]
SPECS += [CouplingSpec(eps=0.05, factor=0.6)]


def case_name(value: object) -> str:
    """A short id for pytest."""
    if isinstance(value, CouplingSpec):
        return f"{value.coupling}-{value.scale_map}-{value.eps}-{value.factor}-{value.order}"
    return str(value).replace("torch.", "").replace(" ", "")


def _with_gradients(function: Callable[..., object], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs of function and the gradients of its inputs, for fixed random output gradients, computed in dtype."""
    leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator, device="cpu").to(out) for out in outputs]
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    gradients = torch.autograd.grad([out for out, _ in pairs], leaves, [grad for _, grad in pairs])
    return [*outputs, *gradients]


def log_det_magnitude(net_out: Tensor, spec: CouplingSpec) -> float:
    """Compute the size of a sum of log s that cancel: roundings of n terms grow like a random walk, sqrt(n) of one."""
    if spec.coupling == "additive" or not net_out.numel():
        return 0.0
    _, log_scale = reference.scale_and_log(net_out.double().chunk(2, dim=1)[1], spec)
    return math.sqrt(log_scale[0].numel()) * float(log_scale.abs().max())


def compare(name: str, inputs: list[Tensor], *rest: object, magnitude: float = 0.0) -> None:
    """Values and gradients of functional.<name> are as good as those of the reference in the same dtype."""
    compiled, plain = getattr(functional, name), getattr(reference, name)
    dtype = inputs[0].dtype
    got = _with_gradients(lambda *args: compiled(*args, *rest), inputs, dtype)
    same = _with_gradients(lambda *args: plain(*args, *rest), inputs, dtype)
    exact = _with_gradients(lambda *args: plain(*args, *rest), inputs, torch.float64)
    for actual, in_torch, truth in zip(got, same, exact, strict=True):
        assert_kernel_close(actual, in_torch, truth, magnitude if truth.dim() == 1 else 0.0)


def assert_bits_do_not_depend_on_threads(run: Callable[[Tensor], Sequence[Tensor]], x: Tensor, threads: int) -> None:
    """``run(x)`` gives the same bits on ``threads`` threads as on one.

    Before each, NaN goes through the memory that the calling thread keeps, on that thread alone: otherwise what a run
    leaves unwritten might be there, and right, from the run before.
    """
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(1)
            run(torch.full_like(x, torch.nan))
            torch.set_num_threads(count)
            results.append(run(x))
    finally:
        torch.set_num_threads(before)
    for on_one, on_several in zip(*results, strict=True):
        assert torch.equal(on_one, on_several), f"{threads} threads give other bits than one"


def mix_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Draw x, a matrix and an offset."""
    channels = shape[1]
    # An offset far from zero: taking it off before the product must not cost precision.
    values = [torch.randn(shape), torch.randn(channels, channels) / math.sqrt(channels), 3.0 + torch.randn(channels)]
    return [value.to(device, dtype) for value in values]


def coupling_inputs(
    shape: tuple[int, ...], spec: CouplingSpec, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """x and a net's output for all but half of its channels."""
    n, channels, *spatial = shape
    transformed = channels - channels // 2
    width = transformed * (2 if spec.coupling == "affine" else 1)
    return [torch.randn(shape).to(device, dtype), torch.randn(n, width, *spatial).to(device, dtype)]
