"""The compiled kernels against the reference: values, gradients, layouts, sizes, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import covering
from support.covering import pairs
from support.helpers import assert_close, memory_layouts
from support.kernel_cases import (
    DTYPES,
    SHAPES,
    SPECS,
    assert_bits_do_not_depend_on_threads,
    case_name,
    compare,
    coupling_inputs,
    log_det_magnitude,
    mix_inputs,
)
from torch import Tensor

from pyglow_fast import _backend, functional, ops, reference
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")


@pairs(
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("shape", SHAPES, ids=case_name),
    pytest.mark.parametrize("name", ["channel_mix", "channel_unmix"]),
)
def test_channel_mix_equals_reference(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    compare(name, mix_inputs(shape, dtype, device))


@pairs(
    pytest.mark.parametrize("dtype", DTYPES, ids=case_name),
    pytest.mark.parametrize("shape", SHAPES, ids=case_name),
    pytest.mark.parametrize("spec", SPECS, ids=case_name),
    pytest.mark.parametrize("name", ["coupling", "coupling_inverse"]),
)
def test_coupling_equals_reference(
    name: str, spec: CouplingSpec, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    inputs = coupling_inputs(shape, spec, dtype, device)
    compare(name, inputs, spec, magnitude=log_det_magnitude(inputs[1], spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.scale_map != "exp"], ids=case_name)
def test_extreme_raw_values(spec: CouplingSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Raw scales in [-30, 30]: s may be tiny, log s and the gradients must not lose it."""
    x, net_out = coupling_inputs((2, 6, 5, 9), spec, dtype, device)
    net_out = (20.0 * net_out).clamp(-30.0, 30.0)
    compare("coupling", [x, net_out], spec, magnitude=log_det_magnitude(net_out, spec))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
def test_log_scale_survives_underflow(dtype: torch.dtype, device: torch.device) -> None:
    """sigmoid(-800) is zero in either dtype, its logarithm is -800."""
    net_out = torch.tensor([[[0.0], [-800.0]]], dtype=dtype, device=device)
    _, log_det = functional.coupling(torch.ones(1, 1, 1).to(net_out), net_out, CouplingSpec(bias=0.0))
    assert log_det.item() == -800.0
    net_out.requires_grad_()
    _, log_det = functional.coupling(torch.ones(1, 1, 1).to(net_out), net_out, CouplingSpec(bias=0.0, factor=2.0))
    assert log_det.item() == torch.tensor(math.log(2.0) - 800.0, dtype=dtype).item()
    (gradient,) = torch.autograd.grad(log_det.sum(), net_out)
    assert gradient.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("function", [functional.coupling, functional.coupling_inverse])
def test_overflowing_scale_is_refused(function: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> None:
    x, net_out = torch.ones(3, 2, 4, device=device), torch.zeros(3, 2, 4, device=device)
    net_out[1, 1, 2] = 100.0  # exp(100) is inf in float32
    if device.type == "cpu":
        with pytest.raises(ValueError, match=r"net_out: expected raw scales whose exp is finite.*sample 1"):
            function(x, net_out, CouplingSpec(scale_map="exp"))
    else:
        _, log_det = function(x, net_out, CouplingSpec(scale_map="exp"))
        assert log_det.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_shows(value: float, device: torch.device) -> None:
    """NaN and inf in the input reach the output, also at the ragged end of a sample."""
    x = torch.zeros(1, 4, 37, device=device)
    x[0, 3, 36] = value
    mixed = functional.channel_mix(x, torch.ones(4, 4, device=device), torch.zeros(4, device=device))
    assert not mixed[0, :, 36].isfinite().any()
    assert mixed[0, :, :36].isfinite().all()
    net_out = torch.zeros(1, 4, 37, device=device)
    net_out[0, 3, 36] = math.nan
    y, log_det = functional.coupling(torch.zeros_like(x), net_out, CouplingSpec())
    assert y[0, 3, 36].isnan()
    assert log_det.isnan().all()


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((2, 6, 5, 9), torch.channels_last), ((2, 6, 3, 2, 5), torch.channels_last_3d)],
    ids=case_name,
)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[-1]], ids=case_name)
def test_layouts(
    spec: CouplingSpec, shape: tuple[int, ...], channels_last: torch.memory_format, device: torch.device
) -> None:
    """Strides change nothing but speed; a dense layout is kept."""
    x, matrix, offset = mix_inputs(shape, torch.float64, device)
    grad = torch.randn_like(x)
    _, net_out = coupling_inputs(shape, spec, torch.float64, device)
    codes, grad_log_det = ops.coupling_arguments(spec, inverse=False), torch.randn(2).to(x)
    mixed, mixed_grads = (
        ops.channel_mix(x, matrix, offset, True, 0),
        ops.channel_mix_backward(x, grad, matrix, offset, None, False),
    )
    coupled = ops.coupling(x, net_out, *codes)
    coupled_grads = ops.coupling_backward(x, net_out, grad, grad_log_det, *codes, True)
    for name, layout in memory_layouts(x).items():
        got = ops.channel_mix(layout, matrix.T.contiguous().T, offset, True, 0)
        assert_close(got, mixed)
        assert got.is_contiguous(memory_format=channels_last) == name.startswith("channels_last")
        for other in (memory_layouts(grad)[name], grad):
            for actual, expected in zip(
                ops.channel_mix_backward(layout, other, matrix, offset, None, False), mixed_grads, strict=True
            ):
                assert_close(actual, expected)
        for other in (memory_layouts(net_out)[name], net_out):
            for actual, expected in zip(ops.coupling(layout, other, *codes), coupled, strict=True):
                assert_close(actual, expected)
            arguments = (layout, other, memory_layouts(grad)[name], grad_log_det, *codes, True)
            for actual, expected in zip(ops.coupling_backward(*arguments), coupled_grads, strict=True):
                assert_close(actual, expected)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=case_name)
def test_backward_recovers_the_input(spec: CouplingSpec, inverse: bool, device: torch.device) -> None:
    x, net_out = coupling_inputs((2, 7, 5, 9), spec, torch.float64, device)
    codes = ops.coupling_arguments(spec, inverse)
    out, log_det = ops.coupling(x, net_out, *codes)
    recovered = ops.coupling_backward(out, net_out, out, log_det, *codes, True)[2]
    assert_close(recovered, x, condition=100.0)  # s between about 1/20 and 20 here, passed through twice
    assert ops.coupling_backward(out, net_out, out, log_det, *codes, False)[2].numel() == 0


@pytest.mark.alone
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    """With work for all of them at the same time; in channels-last every tile goes through scratch memory."""
    x, matrix, _ = mix_inputs((24, 48, 32, 32), torch.float32, torch.device("cpu"))
    grad, codes = torch.randn_like(x), ops.coupling_arguments(CouplingSpec(), inverse=False)

    def run(x: Tensor) -> list[Tensor]:
        last = x.to(memory_format=torch.channels_last)
        return [
            *ops.channel_mix_backward(x, grad, matrix, None, None, False),
            *ops.channel_mix_backward(last, grad, matrix, None, None, False),
            *ops.coupling(x, grad, *codes),
            *ops.coupling_backward(last, grad, grad, grad[:, 0, 0, 0], *codes, True),
        ]

    assert_bits_do_not_depend_on_threads(run, x, threads)


def test_what_depends_on_threads_is_found() -> None:
    memory = torch.zeros(3)

    def unwritten(x: Tensor) -> list[Tensor]:
        if torch.get_num_threads() == 1:
            memory.copy_(x)
        return [memory.clone()]

    for run in (lambda x: [x * torch.get_num_threads()], unwritten):
        with pytest.raises(AssertionError, match="2 threads give other bits"):
            assert_bits_do_not_depend_on_threads(run, torch.ones(3), 2)


def test_gradcheck(device: torch.device) -> None:
    """Through the compiled kernels and the autograd Functions, against finite differences in float64."""
    x, matrix, offset = (value.requires_grad_() for value in mix_inputs((2, 4, 3, 2), torch.float64, device))
    assert torch.autograd.gradcheck(functional.channel_mix, (x, matrix, offset))
    assert torch.autograd.gradcheck(functional.channel_unmix, (x, matrix, offset))
    for spec in SPECS:
        _, net_out = coupling_inputs((2, 4, 3, 2), spec, torch.float64, device)
        net_out.requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b, spec=spec: functional.coupling(a, b, spec), (x, net_out))
        assert torch.autograd.gradcheck(lambda a, b, spec=spec: functional.coupling_inverse(a, b, spec), (x, net_out))


def test_frozen_matrix_still_passes_the_gradient() -> None:
    x, matrix, offset = mix_inputs((2, 4, 3, 2), torch.float64, torch.device("cpu"))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.channel_mix(x, matrix, offset).sum(), x)
    assert_close(gradient, reference.channel_mix(torch.ones_like(x), matrix.T, torch.zeros_like(offset)))


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80-real,90-real,100-real,120", (8, 0), True),
        ("80-real,90-real,100-real,120", (8, 6), True),
        ("80-real,90-real,100-real,120", (9, 0), True),
        ("80-real,90-real,100-real,120", (7, 5), False),
        ("80-real,90-real,100-real,120", (11, 0), False),
        ("80-real,90-real,100-real,120", (13, 0), True),
        ("86-real", (8, 0), False),
        ("90a-real", (9, 0), True),
        ("70", (12, 1), True),
        ("", (9, 0), False),
    ],
)
def test_which_gpus_run_what_was_compiled(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert ops.runs_on_capability(archs, capability) is runs


def test_second_derivative_is_refused() -> None:
    x, matrix, offset = (value.requires_grad_() for value in mix_inputs((2, 4, 3), torch.float64, torch.device("cpu")))
    u = functional.channel_mix(x, matrix, offset)
    for value in (u.square().sum(), u.sum()):  # the gradient that comes into the second one wants none itself
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()


def test_expanded_inputs(device: torch.device) -> None:
    """One channel expanded to several, in an odd order of dimensions: the elements overlap in memory."""
    x = torch.randn(8, 7, 5, dtype=torch.float64, device=device).permute(2, 0, 1)[:, None].expand(5, 4, 8, 7)
    net_out = torch.randn(8, 7, 5, dtype=torch.float64, device=device).permute(2, 0, 1)[:, None].expand(5, 4, 8, 7)
    matrix, offset = torch.randn(4, 4).to(x), torch.randn(4).to(x)
    codes, log_det = ops.coupling_arguments(CouplingSpec(), inverse=False), torch.randn(5).to(x)

    def run(x: Tensor, net_out: Tensor) -> list[Tensor]:
        return [
            ops.channel_mix(x, matrix, offset, False, 0),
            *ops.channel_mix_backward(x, net_out, matrix, None, None, False),
            *ops.coupling(x, net_out, *codes),
            *ops.coupling_backward(x, net_out, net_out, log_det, *codes, True),
        ]

    for got, expected in zip(run(x, net_out), run(x.contiguous(), net_out.contiguous()), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_name)
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    """Schema, fake kernel and dispatch of every op, by torch's own checker (the ops themselves have no gradient)."""
    x, matrix, offset = mix_inputs((2, 6, 5, 3), dtype, device)
    codes = ops.coupling_arguments(SPECS[0], inverse=False)
    log_det = torch.randn(2).to(x)
    layouts = (x, *memory_layouts(x).values(), x[:, :1].expand_as(x))
    # The other dtype is asked about itself, not about layouts once more.
    for layout in layouts if covering.full or dtype == torch.float32 else layouts[:1]:
        torch.library.opcheck(ops.channel_mix, (layout, matrix, offset, False, 0))
        torch.library.opcheck(ops.channel_mix_backward, (layout, layout, matrix, None, None, False))
        torch.library.opcheck(ops.coupling, (layout, x, *codes))
        torch.library.opcheck(ops.coupling_backward, (layout, x, x, log_det, *codes, False))
        torch.library.opcheck(ops.coupling_backward, (layout, x, x, log_det, *codes, True))


X, M, C = torch.zeros(2, 4, 3, 3), torch.eye(4), torch.zeros(4)
CODES = ops.coupling_arguments(CouplingSpec(), inverse=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.channel_mix(X[0, 0, 0], M, C, False, 0), r"x: expected shape \(N, C, \*spatial\), found \[3\]"),
        (lambda: ops.channel_mix(X.half(), M, C, False, 0), "x: expected dtype float32 or float64, found float16"),
        (lambda: ops.channel_mix(X, M.double(), C, False, 0), "matrix: expected dtype float32 like x, found float64"),
        (lambda: ops.channel_mix(X, M[:3], C, False, 0), r"matrix: expected shape \[4, 4\], found \[3, 4\]"),
        (lambda: ops.channel_mix(X, M, C[:3], False, 0), r"offset: expected shape \[4\], found \[3\]"),
        (
            lambda: ops.channel_mix_backward(X, X[:1], M, None, None, False),
            r"grad_u: expected shape \[2, 4, 3, 3\], found",
        ),
        (
            lambda: ops.channel_mix_backward(X, X, M, C.double(), None, False),
            "center: expected dtype float32 like x, found float64",
        ),
        (lambda: ops.coupling(X, X[:, :3], *CODES), "net_out: expected 2 times at most 4 channels"),
        (lambda: ops.coupling(X[:, :1], X, *CODES), "net_out: expected 2 times at most 1 channels"),
        (lambda: ops.coupling(X, X[..., :2], *CODES), r"net_out: expected shape \[2, 4, 3, 3\], found \[2, 4, 3, 2\]"),
        (lambda: ops.coupling(X, X.flatten(2), *CODES), "net_out: expected 4 dimensions like x"),
        (lambda: ops.coupling(X, X.double(), *CODES), "net_out: expected dtype float32 like x, found float64"),
        (lambda: ops.channel_mix_backward(X, X, C, None, None, False), r"matrix: expected shape \[4, 4\], found \[4\]"),
        (lambda: ops.channel_mix_backward(X, X, M, C[:2], None, False), r"center: expected shape \[4\], found \[2\]"),
        (
            lambda: ops.coupling_mix_backward(X, X, X, C[:2], C, *CODES[:2], *CODES[3:], None),
            r"matrix: expected shape \[4, 4\], found \[4\]",
        ),
        (
            lambda: ops.step_backward(X, X, X, C[:2], M[:3], C, *CODES[:2], *CODES[3:]),
            r"inverse_matrix: expected shape \[4, 4\], found \[3, 4\]",
        ),
        (
            lambda: ops.coupling(X, X, 4, 0, False, 0.0, 0.0, 200.0, 1.0),
            "clamp: expected a positive number, at most 88 in float32, found 200",
        ),
        (lambda: ops.coupling(X, X, 5, 0, False, 0.0, 0.0, 0.0, 1.0), "clamp: expected a positive number"),
        (lambda: ops.coupling(X, X, 2, 0, False, 0.0, -1.0, 1.0, 1.0), "eps: expected 0 or more, found -1"),
        (lambda: ops.coupling(X, X, 1, 0, False, 0.0, 0.0, 1.0, 2.0), "factor: expected 1, or .*, found 2"),
        (lambda: ops.coupling(X, X, 2, 0, False, 0.0, 0.0, 1.0, 0.0), "factor: expected 1, or .* of float32, found 0"),
        (lambda: ops.coupling(X, X, 2, 0, False, 0.0, 0.0, 1.0, 1e-40), "factor: .* of float32, found 1e-40"),
        (lambda: ops.coupling(X, X, 2, 0, False, 0.0, 0.0, 1.0, math.inf), "factor: .* of float32, found inf"),
        (lambda: ops.coupling(X, X, 2, 0, False, 0.0, 0.0, 1.0, math.nan), "factor: .* of float32, found nan"),
        (lambda: ops.coupling(X, X, 9, *CODES[1:]), "map: expected a ScaleMap, found 9"),
        (lambda: ops.coupling(X, X, 1, 2, *CODES[2:]), "order: expected 0 or 1, found 2"),
        (lambda: ops.coupling_backward(X, X, X, C, *CODES, False), r"grad_log_det: expected shape \[2\], found \[4\]"),
        (lambda: ops.coupling_backward(X, X, X[:1], C[:2], *CODES, False), "grad_out: expected shape"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
