"""64-bit index arithmetic of the CPU kernels: strides beyond 2^31 elements, in memory that is mostly not there.

Inputs only: the ops allocate what they write. tests/emulation has both for the CUDA kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_close
from support.kernel_cases import case_name
from support.sparse_memory import SparseMemory
from torch import Tensor

from pyglow_fast import _backend, ops, reference
from pyglow_fast.reference import Activation, ChainSpec, CouplingSpec

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")

SHAPE = (3, 4, 2, 5)
CODES = ops.coupling_arguments(CouplingSpec(), inverse=False)
BACKWARD_CODES = (*CODES[:2], *CODES[3:])
MATRIX = torch.linspace(-1.0, 1.0, 16).square().view(4, 4) + torch.eye(4)
OFFSET, LOG_DET = torch.linspace(0.5, 2.0, 4), torch.linspace(-1.0, 1.0, 3)
NONE, INPUT, OUTPUT = (ops.SQUEEZE_CODES[name] for name in ("none", "input", "output"))

# A net of x and a condition: both ways of doing a convolution, gathered and by sums of taps.
WEIGHTS = [torch.linspace(-1.0, 1.0, math.prod(s)).sin().view(s) for s in ((6, 8, 1, 3), (9, 6, 3, 1), (4, 9, 3, 3))]
BIASES = [torch.linspace(-0.5, 0.5, weight.shape[0]) for weight in WEIGHTS]
CHAIN = ops.chain_arguments(ChainSpec((Activation(), Activation("silu")), ((1, 1),) * 3))


def net(x: Tensor, cond: Tensor, half: bool = False) -> Tensor:
    return ops.net_chain(x, cond, WEIGHTS, BIASES, None, *CHAIN, half, False)[0]


def net_backward(grad: Tensor, x: Tensor, cond: Tensor, half: bool = False) -> tuple[Tensor, ...]:
    kept = ops.net_chain(x, cond, WEIGHTS, BIASES, None, *CHAIN, half, True)[1]
    return tuple(ops.net_chain_backward(grad, x, cond, kept, WEIGHTS, None, None, *CHAIN, half, True))


# Each op with the inputs that it reads through strides, all of SHAPE.
OPS: dict[str, tuple[int, Callable[..., object]]] = {
    "channel_mix": (1, lambda x: ops.channel_mix(x, MATRIX, OFFSET, False, NONE)),
    "channel_unmix": (1, lambda x: ops.channel_mix(x, MATRIX, OFFSET, True, NONE)),
    "channel_mix_unsqueezed": (1, lambda x: ops.channel_mix(x, MATRIX, OFFSET, False, OUTPUT)),
    "channel_mix_backward": (2, lambda x, g: ops.channel_mix_backward(x, g, MATRIX, OFFSET, None, False)),
    "channel_mix_backward_added": (3, lambda x, g, a: ops.channel_mix_backward(x, g, MATRIX, None, a, False)),
    "coupling": (2, lambda x, net: ops.coupling(x, net, *CODES)),
    "coupling_backward": (3, lambda y, net, g: ops.coupling_backward(y, net, g, LOG_DET, *CODES, True)),
    "coupling_mix": (2, lambda x, net: ops.coupling_mix(x, net, MATRIX, OFFSET, *CODES)),
    "coupling_mix_backward": (
        4,
        lambda x, net, g, a: ops.coupling_mix_backward(x, net, g, LOG_DET, MATRIX, *BACKWARD_CODES, a),
    ),
    "step_backward": (3, lambda y, net, g: ops.step_backward(y, net, g, LOG_DET, MATRIX, OFFSET, *BACKWARD_CODES)),
    "channel_moments": (1, ops.channel_moments),
    "gaussian_log_prob": (3, ops.gaussian_log_prob),
    "gaussian_log_prob_backward": (3, lambda z, m, s: ops.gaussian_log_prob_backward(z, m, s, LOG_DET)),
    "gaussian_sample": (3, ops.gaussian_sample),
    "invert_matrices": (1, lambda x: ops.invert_matrices(x[:, :, 0, :4])),
    "checkerboard_split": (1, lambda x: ops.checkerboard_split(x, 1, True)),
    "checkerboard_merge": (1, lambda x: ops.checkerboard_merge(x, 1, True)),
    "net_chain": (2, net),
    "net_chain_half": (2, functools.partial(net, half=True)),
    "net_chain_backward": (3, net_backward),
    "net_chain_backward_half": (3, functools.partial(net_backward, half=True)),
}
NETS = ("coupling", "coupling_backward", "coupling_mix", "coupling_mix_backward", "step_backward")  # the second input


def assert_same(got: object, expected: object) -> None:
    for actual, exact in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert actual.dtype == exact.dtype
        assert_close(actual.double(), exact.double(), dtype=torch.float32)


@pytest.mark.parametrize("dim", ["sample", "channel", "position"])
@pytest.mark.parametrize("name", OPS)
def test_far_inputs(name: str, dim: str) -> None:
    n_inputs, call = OPS[name]
    near = [torch.randn(SHAPE) for _ in range(n_inputs)]
    memory = SparseMemory(torch.float32)
    assert_same(call(*(memory.far(x, dim) for x in near)), call(*near))


def test_every_op_is_covered() -> None:
    assert set(ops.names()) <= set(OPS)


@pairs(
    pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_name),
    pytest.mark.parametrize("dim", ["sample", "channel", "position"]),
    pytest.mark.parametrize("name", NETS),
)
def test_far_net_output(name: str, dim: str, dtype: torch.dtype) -> None:
    """The net's output in 16 bits."""
    n_inputs, call = OPS[name]
    x, net_out, *rest = (torch.randn(SHAPE) for _ in range(n_inputs))
    net_out = net_out.to(dtype)
    assert_same(call(x, SparseMemory(dtype).far(net_out, dim), *rest), call(x, net_out, *rest))


@pytest.mark.parametrize("dim", ["sample", "channel", "position", "row"])
def test_far_images(dim: str) -> None:
    """Images that are squeezed on the way in."""
    images, memory = torch.randn(3, 2, 4, 6), SparseMemory(torch.float32)
    matrix, offset, grad = torch.randn(8, 8), torch.randn(8), torch.randn(3, 8, 2, 3)
    far = memory.far(images, dim)
    assert_same(
        ops.channel_mix(far, matrix, offset, False, INPUT),
        ops.channel_mix(reference.squeeze(images), matrix, offset, False, NONE),
    )
    assert_same(
        ops.channel_mix_backward(far, grad, matrix, None, None, True),
        ops.channel_mix_backward(images, grad, matrix, None, None, True),
    )


@pytest.mark.parametrize("half", [False, True])
def test_far_rows_of_nets(half: bool) -> None:
    """Which are apart by a stride of their own."""
    images, memory = [torch.randn(SHAPE) for _ in range(3)], SparseMemory(torch.float32)
    grad, x, cond = (memory.far(image, "row") for image in images)
    assert_same(net(x, cond, half), net(*images[1:], half))
    assert_same(net_backward(grad, x, cond, half), net_backward(*images, half))


def test_far_is_far() -> None:
    """The elements of a far tensor really lie where their strides say, and tensors do not overlap."""
    memory, x = SparseMemory(torch.float32), torch.arange(24.0).view(2, 3, 4)
    for dim in ("sample", "channel", "position"):
        held: list[Tensor] = [memory.far(x + i, dim) for i in range(2)]
        for i, far in enumerate(held):
            assert torch.equal(far, x + i)
            span = far[-1, -1, -1].data_ptr() - far[0, 0, 0].data_ptr()
            assert span > 4 * 2**31
