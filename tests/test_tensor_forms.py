"""The forms in which kernels take tensors: squeezed by index, gradients in two parts, nets' outputs in 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_close, memory_layouts
from support.kernel_cases import DTYPES, SPECS, case_name, compare, coupling_inputs, mix_inputs
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import _backend, functional, ops, reference
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
CPU = torch.device("cpu")
IMAGES = [(2, 3, 8, 8), (1, 1, 2, 2), (3, 2, 6, 10), (2, 3, 34, 66), (1, 12, 4, 30), (0, 3, 4, 4), (2, 3, 0, 4)]
HALVES = [torch.bfloat16, torch.float16]
CODES = ops.SQUEEZE_CODES


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
@pytest.mark.parametrize("shape", IMAGES, ids=case_name)
def test_squeezed_products_equal_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    squeezed = tuple(reference.squeeze(torch.zeros(shape)).shape)
    x, matrix, offset = mix_inputs(squeezed, dtype, CPU)
    compare("channel_mix", [reference.unsqueeze(x), matrix, offset], True)
    compare("channel_unmix", [x, matrix, offset], True)


@pytest.mark.parametrize("shape", IMAGES[:5], ids=case_name)
def test_squeezed_layouts(shape: tuple[int, ...]) -> None:
    """Every stride of the image is its own: the same bits in every layout, and channels-last gives channels-last."""
    x = torch.randn(shape)
    fine = reference.squeeze(x)
    coarse, matrix, offset = mix_inputs(tuple(fine.shape), torch.float32, CPU)
    expected = ops.channel_mix(x, matrix, offset, False, CODES["input"])
    assert torch.equal(expected, ops.channel_mix(fine, matrix, offset, False, CODES["none"]))
    unsqueezed = ops.channel_mix(coarse, matrix, offset, True, CODES["output"])
    grads = ops.channel_mix_backward(x, coarse, matrix, None, None, True)
    for name, layout in memory_layouts(x).items():
        assert torch.equal(ops.channel_mix(layout, matrix, offset, False, CODES["input"]), expected), name
        for got, wanted in zip(ops.channel_mix_backward(layout, coarse, matrix, None, None, True), grads, strict=True):
            assert torch.equal(got, wanted), name
    for name, layout in memory_layouts(coarse).items():
        assert torch.equal(ops.channel_mix(layout, matrix, offset, True, CODES["output"]), unsqueezed), name
    last = x.to(memory_format=torch.channels_last)
    mixed = ops.channel_mix(last, matrix, offset, False, CODES["input"])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    transposed = x.mT.contiguous().mT  # rows and columns of the image swapped in memory
    assert torch.equal(ops.channel_mix(transposed, matrix, offset, False, CODES["input"]), expected)


def forms(out: Tensor | tuple[Tensor, ...]) -> list[tuple[torch.Size, tuple[int, ...]]]:
    """Shape and strides of every output."""
    return [(value.shape, value.stride()) for value in ((out,) if isinstance(out, Tensor) else out)]


def test_squeezed_products_without_values() -> None:
    """On tensors that are shapes alone, as torch.compile has them, the results have the shapes of the real ones."""
    coarse, matrix, offset = mix_inputs((2, 8, 3, 5), torch.float32, CPU)
    x = reference.unsqueeze(coarse)
    for layout in (torch.contiguous_format, torch.channels_last):
        coarse, x = coarse.to(memory_format=layout), x.to(memory_format=layout)
        calls = [
            (ops.channel_mix, (x, matrix, offset), (False, CODES["input"])),
            (ops.channel_mix, (coarse, matrix, offset), (True, CODES["output"])),
            (ops.channel_mix_backward, (x, coarse, matrix), (None, None, True)),
        ]
        for op, tensors, options in calls:
            assert forms(op(*(value.to("meta") for value in tensors), *options)) == forms(op(*tensors, *options))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions_squeeze_on_the_reference(dims: int) -> None:
    x = torch.randn(2, 2, *[4] * dims, dtype=torch.float64)
    channels = 2 * 2**dims
    matrix, offset = torch.randn(channels, channels).double(), torch.randn(channels).double()
    expected = reference.channel_mix(reference.squeeze(x), matrix, offset)
    assert_close(functional.channel_mix(x, matrix, offset, True), expected)
    restored = functional.channel_unmix(expected, torch.linalg.inv(matrix), offset, True)
    assert_close(restored, x, condition=float(torch.linalg.cond(matrix)))


@pairs(
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1]], ids=case_name),
    pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 12, 40, 33), (2, 4, 9), (0, 4, 3, 3)], ids=case_name),
)
def test_gradient_in_two_parts(shape: tuple[int, ...], spec: CouplingSpec, dtype: torch.dtype) -> None:
    """The added part enters as if the sum had been formed before: bit for bit, in every layout."""
    x, net_out = coupling_inputs(shape, spec, dtype, CPU)
    _, matrix, offset = mix_inputs(shape, dtype, CPU)
    grad, added = torch.randn(shape).to(dtype), torch.randn(shape)[:, : shape[1] // 2].to(dtype)
    grad_log_det = torch.randn(shape[0]).to(dtype)
    total = grad.clone()
    total[:, : shape[1] // 2] += added
    codes = ops.coupling_arguments(spec, inverse=False)
    forward_codes = (*codes[:2], *codes[3:])

    def run(grad: Tensor, added: Tensor | None) -> list[Tensor]:
        return [
            *ops.channel_mix_backward(x, grad, matrix, offset, added, False),
            *ops.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, *forward_codes, added),
        ]

    expected = run(total, None)
    cases = {"contiguous": (grad, added)} | {
        name: (layout, memory_layouts(added)[name]) for name, layout in memory_layouts(grad).items()
    }
    for name, (layout, added_layout) in cases.items():
        for got, wanted in zip(run(layout, added_layout), expected, strict=True):
            assert torch.equal(got, wanted), name


def test_kept_channels_carry_their_gradient() -> None:
    """What a coupling net makes of the kept channels flows back as through a slice, also when it is the only use."""
    x, matrix, offset = mix_inputs((2, 6, 3, 4), torch.float64, CPU)
    spec = CouplingSpec()
    net_out = torch.randn(2, 6, 3, 4, dtype=torch.float64)

    def through_kept(both: bool) -> Callable[..., Tensor]:
        def objective(x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
            u, kept = functional.channel_mix_for_net(x, matrix, offset, 3)
            y, kept_y, log_det = functional.coupling_mix_for_net(u, net_out, matrix, offset, spec, 3)
            value = kept.square().sum() + kept_y.sin().sum()
            return value + y.cos().sum() + log_det.sum() if both else value

        return objective

    def through_slices(both: bool) -> Callable[..., Tensor]:
        def objective(x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
            u = reference.channel_mix(x, matrix, offset)
            y, log_det = reference.coupling_mix(u, net_out, matrix, offset, spec)
            value = u[:, :3].square().sum() + y[:, :3].sin().sum()
            return value + y.cos().sum() + log_det.sum() if both else value

        return objective

    for both in (True, False):
        gradients = []
        for objective in (through_kept(both), through_slices(both)):
            leaves = [value.clone().requires_grad_() for value in (x, net_out, matrix, offset)]
            gradients.append(torch.autograd.grad(objective(*leaves), leaves))
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, condition=10.0)


@pairs(
    pytest.mark.parametrize("half", HALVES, ids=case_name),
    pytest.mark.parametrize("spec", SPECS, ids=case_name),
    pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 12, 40, 33), (2, 4, 9)], ids=case_name),
)
def test_net_output_in_16_bits(shape: tuple[int, ...], spec: CouplingSpec, half: torch.dtype) -> None:
    """Read as the float32 numbers that they are, and gradients rounded once: bit for bit, in every layout."""
    x, net_out = coupling_inputs(shape, spec, torch.float32, CPU)
    _, matrix, offset = mix_inputs(shape, torch.float32, CPU)
    low, grad, grad_log_det = net_out.to(half), torch.randn(shape), torch.randn(shape[0])

    def run(net_out: Tensor) -> list[Tensor]:
        results = []
        for inverse in (False, True):
            codes = ops.coupling_arguments(spec, inverse)
            results += ops.coupling(x, net_out, *codes)
            results += ops.coupling_backward(x, net_out, grad, grad_log_det, *codes, True)
            results += ops.coupling_mix(x, net_out, matrix, offset, *codes)
        codes = (*codes[:2], *codes[3:])
        results += ops.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, *codes, None)
        results += ops.step_backward(x, net_out, grad, grad_log_det, matrix, offset, *codes)
        return results

    wide = {"contiguous": low.float(), **memory_layouts(low.float())}
    for name, layout in {"contiguous": low, **memory_layouts(low)}.items():
        for got, wanted in zip(run(layout), run(wide[name]), strict=True):
            assert torch.equal(got, wanted.to(got.dtype)), name
            assert got.dtype == (half if got.shape == low.shape and got.dtype == half else torch.float32)


@pytest.mark.parametrize("half", HALVES, ids=case_name)
def test_all_16_bit_numbers(half: torch.dtype) -> None:
    """Widening all 65536 of them, and narrowing floats of every exponent, ties among them, as torch does."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    codes = ops.coupling_arguments(CouplingSpec("additive"), inverse=False)
    x = torch.zeros(1, 2, numbers.numel())
    out, _ = ops.coupling(x, numbers.reshape(1, 1, -1), *codes)
    assert torch.equal(out[0, 1].nan_to_num(12345.0), numbers.float().nan_to_num(12345.0))

    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    finite = numbers.float()[numbers.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()  # halfway between neighbours
    floats = torch.cat([bits, ties, -ties, torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e-8, 3e38])])
    grad = torch.zeros(1, 2, floats.numel())
    grad[0, 1] = floats
    net_out = torch.zeros(1, 1, floats.numel(), dtype=half)
    narrowed = ops.coupling_backward(grad, net_out, grad, torch.zeros(1), *codes, False)[1][0, 0]
    expected = floats.to(half)
    assert torch.equal(narrowed.isnan(), expected.isnan())
    valid = ~expected.isnan()
    assert torch.equal(narrowed[valid].view(torch.int16), expected[valid].view(torch.int16))


def test_net_in_lower_precision_feeds_the_kernels() -> None:
    """A net under autocast: its 16-bit output goes to the kernels as it is, the flow's state stays float32."""
    model = pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden=16)
    x = torch.rand(4, 3, 8, 8) - 0.5
    model.initialize(x)
    for step in (step for level in model.levels for step in level.steps):
        torch.nn.init.normal_(step.coupling.net.conv3.weight, std=0.05)
    exact = model.log_prob(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = model.log_prob(x)
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32
    # A bfloat16 number has 8 bits; the 192 dimensions' errors add up at worst.
    assert float((log_prob - exact).detach().abs().max()) < 192 * 2.0**-8
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


X, M, C, L = torch.zeros(2, 4, 4, 4), torch.eye(4), torch.zeros(4), torch.zeros(2)
SPEC = ops.coupling_arguments(CouplingSpec(), inverse=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.channel_mix(X, M, C, False, 3), "squeeze: expected 0 .none., 1 .input. or 2 .output., found 3"),
        (lambda: ops.channel_mix(X, M, C, False, 1), r"matrix: expected shape \[16, 16\], found \[4, 4\]"),
        (
            lambda: ops.channel_mix(X[..., :3], M, C, False, 1),
            r"x: expected even sides to squeeze, found \[2, 4, 4, 3\]",
        ),
        (lambda: ops.channel_mix(X[:, :3], M, C, False, 2), r"x: expected channels in fours to unsqueeze, found"),
        (lambda: ops.channel_mix(X[0], M, C, False, 1), r"x: expected images \(N, C, H, W\) to squeeze, found"),
        (lambda: ops.channel_mix_backward(X, X, M, None, X[:1], False), r"added: expected shape \[2, 4, 4, 4\], found"),
        (lambda: ops.channel_mix_backward(X, X, M, None, X.double(), False), "added: expected dtype float32 like"),
        (lambda: ops.channel_mix_backward(X, X, M, None, None, True), r"grad_u: expected shape \[2, 16, 2, 2\], found"),
        (
            lambda: ops.channel_mix_backward(X[:, :2], X[:, :2], M[:2, :2], None, X, False),
            "added: expected .N, at most 2",
        ),
        (lambda: ops.coupling(X.double(), X.half(), *SPEC), "net_out: expected dtype float64 like x .16 bits go with"),
        (lambda: ops.coupling(X, X.double(), *SPEC), "net_out: expected dtype float32 like x, found float64"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
