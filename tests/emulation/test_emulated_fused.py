"""The CUDA kernels that join a coupling with a channel mixing, and 16-bit nets, against the reference, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.covering import pairs
from support.emulated_cases import (
    MAPS,
    coupling_case,
    coupling_gradients,
    coupling_reference,
    cuts,
    directions,
    dtypes,
    flat,
    mix_case,
    net_channels,
    shapes,
    specs,
)
from support.emulator import LAYOUTS, assert_only_written, laid_out
from support.fused_emulator import FusedEmulator
from support.helpers import assert_close, assert_kernel_close
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast.reference import CouplingSpec

HALVES = [torch.bfloat16, torch.float16]
SPEC = CouplingSpec()
halves = pytest.mark.parametrize("half", HALVES, ids=["bfloat16", "float16"])
layouts = pytest.mark.parametrize("layout", LAYOUTS)
maps = pytest.mark.parametrize("spec", MAPS.values(), ids=MAPS)


@pytest.fixture
def emulator(_library: Path, multiprocessors: int) -> FusedEmulator:
    emulator = FusedEmulator(_library)
    emulator.multiprocessors = multiprocessors
    return emulator


def mixed_reference(inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return reference.coupling_mix_inverse if inverse else reference.coupling_mix


def assert_all_close(actual: tuple[Tensor, ...], function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Each result is as good as the reference in the same dtype, both held against float64; nothing else is written."""
    plain, exact = function(*inputs), function(*(x.double() for x in inputs))
    for got, same_dtype, expected in zip(actual, plain, exact, strict=True):
        assert_only_written(got)
        assert_kernel_close(got, same_dtype, expected.double())


@pairs(
    dtypes,
    shapes,
    specs,
    directions,
    cuts,
)
def test_coupling_mix(
    emulator: FusedEmulator, shape: tuple[int, int, int, int], spec: CouplingSpec, inverse: bool, dtype: torch.dtype
) -> None:
    x, net_out = coupling_case(flat(shape), spec, dtype)
    _, matrix, offset = mix_case(flat(shape), dtype)
    actual = emulator.coupling_mix(x, net_out, matrix, offset, spec, inverse)
    assert_all_close(actual, lambda *args: mixed_reference(inverse)(*args, spec), x, net_out, matrix, offset)


def mixed_gradients(spec: CouplingSpec) -> Callable[..., tuple[Tensor, ...]]:
    """Gradients of x without the net's part, net_out, M and c, from (x, net_out, M, c, grad_out, added, grad_log_det).

    As autograd would give them if the coupling net's backward had added ``added`` to grad_out before.
    """

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs[:4]]
        grad_out, added, grad_log_det = inputs[4:]
        whole = torch.cat([grad_out[:, : added.shape[1]] + added, grad_out[:, added.shape[1] :]], dim=1)
        out, log_det = reference.coupling_mix(*leaves, spec)
        return torch.autograd.grad((out * whole).sum() + (log_det * grad_log_det).sum(), leaves)

    return gradients


@pairs(
    dtypes,
    shapes,
    specs,
    pytest.mark.parametrize("split", [False, True], ids=["whole", "split"]),
    cuts,
)
def test_coupling_mix_backward(
    emulator: FusedEmulator, shape: tuple[int, int, int, int], spec: CouplingSpec, split: bool, dtype: torch.dtype
) -> None:
    x, net_out = coupling_case(flat(shape), spec, dtype)
    grad_out, matrix, _ = mix_case(flat(shape), dtype)
    grad_log_det = torch.randn(x.shape[0], dtype=dtype)
    added = torch.randn_like(x[:, : (x.shape[1] // 2 if split else 0)])
    actual = emulator.coupling_mix_backward(x, net_out, grad_out, grad_log_det, matrix, spec, added if split else None)
    inputs = (x, net_out, matrix, torch.zeros_like(matrix[0]), grad_out, added, grad_log_det)
    assert_all_close(actual, mixed_gradients(spec), *inputs)


def step_reference(spec: CouplingSpec) -> Callable[..., tuple[Tensor, ...]]:
    """x, grad_u, grad_net_out from (u, net_out, grad_y, grad_log_det, A, c), u being the input that gave y."""

    def backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        u, net_out, grad_y, grad_log_det, inverse_matrix, offset = inputs
        grads = coupling_gradients(u, net_out, grad_y, grad_log_det, spec, False)
        y, _ = reference.coupling(u, net_out, spec)
        return reference.coupling_mix_inverse(y, net_out, inverse_matrix, offset, spec)[0], *grads

    return backward


@pairs(
    dtypes,
    shapes,
    specs,
    cuts,
)
def test_step_backward(
    emulator: FusedEmulator, shape: tuple[int, int, int, int], spec: CouplingSpec, dtype: torch.dtype
) -> None:
    u, net_out = coupling_case(flat(shape), spec, dtype)
    grad_y, inverse_matrix, offset = mix_case(flat(shape), dtype)
    grad_log_det = torch.randn(u.shape[0], dtype=dtype)
    y, _ = reference.coupling(u, net_out, spec)
    actual = emulator.step_backward(y, net_out, grad_y, grad_log_det, inverse_matrix, offset, spec)
    assert_all_close(actual, step_reference(spec), u, net_out, grad_y, grad_log_det, inverse_matrix, offset)


class Case:
    """Inputs of all fused ops, and their results by name."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, net: torch.dtype, spec: CouplingSpec) -> None:
        self.spec = spec
        self.x, net_out = coupling_case(shape, spec, dtype)
        self.net_out = net_out.to(net)
        self.grad, self.matrix, self.offset = mix_case(shape, dtype)
        self.added = torch.randn_like(self.x[:, : shape[1] // 2])
        self.grad_log_det = torch.randn(shape[0], dtype=dtype)

    def laid_out(self, layout: str) -> Case:
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        for name in ("x", "net_out", "grad", "added"):
            setattr(other, name, laid_out(getattr(self, name), layout))
        return other

    def run(self, emulator: FusedEmulator) -> list[Tensor]:
        """All results; those that are log_det first."""
        log_dets, rest = [], []
        for inverse in (False, True):
            out, log_det = emulator.coupling_mix(self.x, self.net_out, self.matrix, self.offset, self.spec, inverse)
            y, other_log_det = emulator.coupling(self.x, self.net_out, self.spec, inverse)
            grads = emulator.coupling_backward(self.x, self.net_out, self.grad, self.grad_log_det, self.spec, inverse)
            log_dets += [log_det, other_log_det]
            rest += [out, y, *(g for g in grads if g is not None)]
        common = (self.x, self.net_out, self.grad, self.grad_log_det, self.matrix)
        rest += emulator.coupling_mix_backward(*common, self.spec, self.added)
        rest += emulator.step_backward(*common, self.offset, self.spec)
        return [*log_dets, *rest]


# Whole vectors with one and several samples to a tile; ragged; one position; several groups of channels; few.
LAYOUT_SHAPES = [(2, 12, 24), (1, 8, 160), (3, 7, 15), (2, 48, 36), (4, 16, 1), (1, 140, 12), (2, 2, 1300)]


@pairs(
    pytest.mark.parametrize("shape", LAYOUT_SHAPES, ids=lambda s: "x".join(map(str, s))),
    layouts,
    pytest.mark.parametrize("out_layout", ["contiguous", "same"]),
    pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"]),
    cuts,
)
def test_layouts(
    emulator: FusedEmulator, shape: tuple[int, int, int], layout: str, out_layout: str, precision: str
) -> None:
    """Layouts change addresses, not values; log_det alone is added up in another order."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    case = Case(shape, dtype, torch.bfloat16 if precision == "bfloat16" else dtype, SPEC)
    expected = case.run(emulator)
    emulator.out_layout = layout if out_layout == "same" else out_layout
    actual = case.laid_out(layout).run(emulator)
    for index, (got, values) in enumerate(zip(actual, expected, strict=True)):
        assert_only_written(got)
        if index < 4:
            assert_close(got / shape[2], values / shape[2])
        else:
            assert torch.equal(got, values), index


@pairs(
    pytest.mark.parametrize("shape", [(2, 4, 20), (3, 7, 15), (1, 70, 24)], ids=lambda s: "x".join(map(str, s))),
    halves,
    maps,
    cuts,
)
def test_16_bit_nets(
    emulator: FusedEmulator, shape: tuple[int, int, int], half: torch.dtype, spec: CouplingSpec
) -> None:
    """The net's output enters as the numbers that it is, to the bit; its gradient is rounded once, to nearest."""
    case = Case(shape, torch.float32, half, spec)
    wide = object.__new__(Case)
    wide.__dict__.update(case.__dict__)
    wide.net_out = case.net_out.float()
    actual, expected = case.run(emulator), wide.run(emulator)
    assert {x.dtype for x in actual} == {torch.float32, half}
    for got, values in zip(actual, expected, strict=True):
        assert_only_written(got)
        if got.dtype == half:
            assert torch.equal(got, values.to(half))
        else:
            assert torch.equal(got, values)


@halves
def test_every_16_bit_number(emulator: FusedEmulator, half: torch.dtype) -> None:
    """All numbers, infinities and NaN among them, come in and go out as torch converts them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    shift, zeros = numbers.view(1, 1, -1), torch.zeros(1, 1, 2**16)
    spec = MAPS["additive"]
    for where in (slice(None), slice(1, None)):  # in vectors and one by one
        out, _ = emulator.coupling(zeros[..., where], shift[..., where].contiguous(), spec)
        # A sum with zero keeps every bit but the sign of zero.
        assert torch.equal(out.nan_to_num(7.25), shift[..., where].float().nan_to_num(7.25))
        assert torch.equal(out.isnan(), shift[..., where].isnan())
    # Gradients: halfway between neighbours, a little above and below; too small, too large.
    wide = numbers[numbers.isfinite()].float()
    grads = torch.cat([wide, wide.nextafter(wide + 1), wide * (1 + 2.0**-9), wide * (1 + 2.0**-12), wide * 1e-3])
    grads = torch.cat([grads, grads.nextafter(grads * 2), torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 65519.9])])
    for length in (grads.numel() // 4 * 4, grads.numel() // 4 * 4 - 1):
        grad_out = grads[:length].view(1, 1, -1)
        x, net_out = torch.zeros_like(grad_out), torch.zeros(grad_out.shape, dtype=half)
        got = emulator.coupling_backward(x, net_out, grad_out, torch.zeros(1), spec).grad_net_out
        assert torch.equal(got, grad_out.to(half))


@pytest.mark.parametrize("kept", [0, 1, 3, 8])
def test_any_split_of_the_channels(emulator: FusedEmulator, kept: int) -> None:
    """The kept channels need not be half of them."""
    shape = (2, kept + 4, 12)
    x, net_out = torch.randn(shape), torch.randn(2, 8, 12)
    grad, matrix, offset = mix_case(shape, torch.float32)
    grad_log_det = torch.randn(2)
    actual = emulator.coupling_mix(x, net_out, matrix, offset, SPEC)
    assert_all_close(actual, lambda *args: reference.coupling_mix(*args, SPEC), x, net_out, matrix, offset)
    inputs = (x, net_out, matrix, offset, grad, x[:, :0], grad_log_det)
    assert_all_close(
        emulator.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, SPEC), mixed_gradients(SPEC), *inputs
    )
    y, _ = reference.coupling(x, net_out, SPEC)
    step = emulator.step_backward(y, net_out, grad, grad_log_det, matrix, offset, SPEC)
    assert_all_close(step, step_reference(SPEC), x, net_out, grad, grad_log_det, matrix, offset)


@dtypes
@cuts
@pytest.mark.parametrize("shape", [(3, 12, 700), (2, 7, 333), (1, 70, 90)], ids=lambda s: "x".join(map(str, s)))
def test_any_order_of_threads_gives_the_same_bits(
    emulator: FusedEmulator, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case = Case(shape, dtype, dtype, SPEC)
    first = case.run(emulator)
    for seed in (1, 2, 12345):
        emulator.seed = seed
        for got, expected in zip(case.run(emulator), first, strict=True):
            assert torch.equal(got, expected)


# Samples in one tile, tiles in one sample, samples that end within tiles; and more tiles than blocks, so that blocks
# walk ranges of tiles with samples that lie within one, in two and in many of them.
LOG_DET_SHAPES = [
    (70, 2, 1),
    (33, 3, 7),
    (5, 4, 100),
    (2, 4, 1024),
    (7, 4, 300),
    (1, 130, 40_000),
    (2600, 2, 100),
    (3, 2, 700_001),
    (601, 2, 1001),
]


@pytest.mark.parametrize("shape", LOG_DET_SHAPES, ids=lambda s: "x".join(map(str, s)))
@directions
@cuts
def test_log_det_of_every_sample(emulator: FusedEmulator, shape: tuple[int, int, int], inverse: bool) -> None:
    """log_det counts each position once, whatever the tiles are. With exp, log s is the net's own output."""
    spec = CouplingSpec(scale_map="exp")
    x = torch.zeros(shape)
    net_out = torch.randint(-3, 4, (shape[0], net_channels(shape[1], spec), shape[2])).float()
    half = net_out.shape[1] // 2
    net_out[:, :half] = 0.0
    eye, zeros = torch.eye(shape[1]), torch.zeros(shape[1])
    _, log_det = emulator.coupling_mix(x, net_out, eye, zeros, spec, inverse)
    expected = net_out[:, half:].double().sum((1, 2))
    assert torch.equal(log_det.double(), -expected if inverse else expected)  # small whole numbers: exact in any order


@pytest.mark.parametrize("channels", [200, 768])
@directions
@cuts
def test_many_channels(emulator: FusedEmulator, channels: int, inverse: bool) -> None:
    """Several groups of output channels, partial sums capped at 16 MB, as the driver checks."""
    shape = (1, channels, 8)
    x, net_out = coupling_case(shape, SPEC, torch.float32)
    grad, matrix, offset = mix_case(shape, torch.float32)
    grad_log_det = torch.randn(1)
    actual = emulator.coupling_mix(x, net_out, matrix, offset, SPEC, inverse)
    function = mixed_reference(inverse)
    assert_all_close(actual, lambda *args: function(*args, SPEC), x, net_out, matrix, offset)
    if inverse:
        return
    inputs = (x, net_out, matrix, offset, grad, x[:, :0], grad_log_det)
    actual_grads = emulator.coupling_mix_backward(x, net_out, grad, grad_log_det, matrix, SPEC)
    assert_all_close(actual_grads, mixed_gradients(SPEC), *inputs)
    y, _ = reference.coupling(x, net_out, SPEC)
    step = emulator.step_backward(y, net_out, grad, grad_log_det, matrix, offset, SPEC)
    assert_all_close(step, step_reference(SPEC), x, net_out, grad, grad_log_det, matrix, offset)


@pytest.mark.parametrize("op", ["coupling_mix", "coupling_mix_backward", "step_backward"])
def test_shared_memory_of_the_widest_tiles(emulator: FusedEmulator, op: str) -> None:
    """32 channels, no whole vectors and tiles enough for a large GPU: the emulator refuses more than 48 KB."""
    spec, shape = MAPS["additive"], (1, 32, 263 * 256 + 1)
    u, net_out = coupling_case(shape, spec, torch.float32)
    grad, matrix, offset = mix_case(shape, torch.float32)
    grad_log_det = torch.randn(1)
    if op == "coupling_mix":
        actual = emulator.coupling_mix(u, net_out, matrix, offset, spec)
        assert_all_close(actual, lambda *args: reference.coupling_mix(*args, spec), u, net_out, matrix, offset)
    elif op == "coupling_mix_backward":
        grads = emulator.coupling_mix_backward(u, net_out, grad, grad_log_det, matrix, spec)
        inputs = (u, net_out, matrix, offset, grad, u[:, :0], grad_log_det)
        assert_all_close(grads, mixed_gradients(spec), *inputs)
    else:
        y, _ = reference.coupling(u, net_out, spec)
        step = emulator.step_backward(y, net_out, grad, grad_log_det, matrix, offset, spec)
        assert_all_close(step, step_reference(spec), u, net_out, grad, grad_log_det, matrix, offset)


def test_offsets_beyond_32_bits(emulator: FusedEmulator) -> None:
    """The elements lie more than 2^31 apart: of such memory only the touched pages exist."""
    case = Case((2, 4, 6), torch.float32, torch.float32, SPEC)
    expected = case.run(emulator)
    far = 2**31 + 8
    try:
        memory = torch.empty(2 * far)
    except RuntimeError:
        pytest.skip("the system does not lend that much untouched memory")
    for strides in ((far, 6, 1), (1, far // 4, 4), (24, 1, far // 6 // 4 * 4)):
        for name in ("x", "net_out", "grad"):
            held = memory.as_strided((2, 4, 6), strides).copy_(getattr(case, name))
            moved = case.laid_out("contiguous")
            setattr(moved, name, held)
            for index, (got, values) in enumerate(zip(moved.run(emulator), expected, strict=True)):
                if index < 4:
                    assert_close(got / 6, values / 6)
                else:
                    assert torch.equal(got, values), name


def test_no_channels(emulator: FusedEmulator) -> None:
    """log_det is zero where there is nothing to couple."""
    x, net_out, matrix, offset = torch.empty(3, 0, 5), torch.empty(3, 0, 5), torch.empty(0, 0), torch.empty(0)
    for inverse in (False, True):
        _, log_det = emulator.coupling_mix(x, net_out, matrix, offset, SPEC, inverse)
        assert torch.equal(log_det, torch.zeros(3))
    assert coupling_reference(x, net_out, SPEC, False)[1].shape == (3,)
