"""The CUDA kernels of the channel mixing by a permutation against the reference, on the CPU."""

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
    directions,
    dtypes,
    flat,
    layouts,
    shapes,
    specs,
)
from support.emulator import allocate, assert_only_written, laid_out
from support.gather_emulator import Gather, GatherEmulator
from support.helpers import assert_close, assert_kernel_close
from torch import Tensor

from pyglow_fast import reference
from pyglow_fast.reference import CouplingSpec

SPEC = CouplingSpec()


@pytest.fixture
def emulator(_library: Path) -> GatherEmulator:
    return GatherEmulator(_library)


def gather_case(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of both signs, an offset, and a permutation."""
    return torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype), torch.randperm(channels)


def assert_all_close(actual: tuple[Tensor, ...], function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Each result is as good as the reference in the same dtype, both held against float64; nothing else is written."""
    plain, exact = function(*inputs), function(*(x.double() for x in inputs))
    for got, same_dtype, expected in zip(actual, plain, exact, strict=True):
        assert_only_written(got)
        assert_kernel_close(got, same_dtype, expected.double())


@pairs(dtypes, shapes, specs, directions)
def test_gather_of_a_coupling(
    emulator: GatherEmulator, shape: tuple[int, int, int, int], spec: CouplingSpec, inverse: bool, dtype: torch.dtype
) -> None:
    x, net_out = coupling_case(flat(shape), spec, dtype)
    scale, offset, index = gather_case(shape[1], dtype)
    gather = Gather(scale, index, None, offset) if inverse else Gather(scale, index, offset)
    actual = emulator.gather(x, gather, net_out, spec, inverse)
    function = reference.coupling_mix_inverse if inverse else reference.coupling_mix
    assert_all_close(actual, lambda *args: function(*args, spec, index), x, net_out, scale, offset)


def gradients(spec: CouplingSpec, index: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """Of x without the net's part, net_out, scales and offset: see mixed_gradients of the fused passes."""

    def found(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs[:4]]
        grad_out, added, grad_log_det = inputs[4:]
        whole = torch.cat([grad_out[:, : added.shape[1]] + added, grad_out[:, added.shape[1] :]], dim=1)
        out, log_det = reference.coupling_mix(*leaves, spec, index)
        return torch.autograd.grad((out * whole).sum() + (log_det * grad_log_det).sum(), leaves)

    return found


@pairs(dtypes, shapes, specs, pytest.mark.parametrize("split", [False, True], ids=["whole", "split"]))
def test_gather_backward(
    emulator: GatherEmulator, shape: tuple[int, int, int, int], spec: CouplingSpec, split: bool, dtype: torch.dtype
) -> None:
    x, net_out = coupling_case(flat(shape), spec, dtype)
    scale, offset, index = gather_case(shape[1], dtype)
    grad_out, grad_log_det = torch.randn_like(x), torch.randn(x.shape[0], dtype=dtype)
    added = torch.randn_like(x[:, : (x.shape[1] // 2 if split else 0)])
    actual = emulator.gather_backward(
        x, Gather(scale, index), grad_out, added if split else None, net_out, grad_log_det, spec
    )
    inputs = (x, net_out, scale, offset, grad_out, added, grad_log_det)
    assert_all_close(actual, gradients(spec, index), *inputs)  # type: ignore[arg-type]


@pairs(dtypes, shapes, specs)
def test_step_gather_backward(
    emulator: GatherEmulator, shape: tuple[int, int, int, int], spec: CouplingSpec, dtype: torch.dtype
) -> None:
    u, net_out = coupling_case(flat(shape), spec, dtype)
    scale, center, index = gather_case(shape[1], dtype)
    grad_y, grad_log_det = torch.randn_like(u), torch.randn(u.shape[0], dtype=dtype)

    def backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        u, net_out, grad_y, grad_log_det, scale, center = inputs
        y, _ = reference.coupling(u, net_out, spec)
        x, _ = reference.coupling_mix_inverse(y, net_out, scale, center, spec, index)
        return x, *coupling_gradients(u, net_out, grad_y, grad_log_det, spec, False)

    y, _ = reference.coupling(u, net_out, spec)
    actual = emulator.step_gather_backward(y, Gather(scale, index, None, center), net_out, grad_y, grad_log_det, spec)
    assert_all_close(actual, backward, u, net_out, grad_y, grad_log_det, scale, center)


def _run(emulator: GatherEmulator, case: dict[str, Tensor]) -> list[Tensor]:
    """All results but log_det."""
    there = Gather(case["scale"], case["index"], case["offset"])
    back = Gather(case["scale"], case["index"], None, case["offset"])
    x, net_out, grad, log_det = (case[name] for name in ("x", "net_out", "grad", "grad_log_det"))
    results: list[Tensor | None] = [
        emulator.gather(x, there)[0],
        emulator.gather(x, there, net_out)[0],
        emulator.gather(x, back, net_out, inverse=True)[0],
        *emulator.gather_backward(x, back, grad),
        *emulator.gather_backward(x, there, grad, case["added"], net_out, log_det),
        *emulator.step_gather_backward(x, back, net_out, grad, log_det, SPEC),
    ]
    return [result for result in results if result is not None]


def _case(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x, net_out = coupling_case(shape, SPEC, dtype)
    scale, offset, index = gather_case(shape[1], dtype)
    grad, added, log_det = torch.randn_like(x), torch.randn_like(x[:, : shape[1] // 2]), torch.randn(shape[0]).to(dtype)
    names = ("x", "net_out", "scale", "offset", "index", "grad", "added", "grad_log_det")
    return dict(zip(names, (x, net_out, scale, offset, index, grad, added, log_det), strict=True))


@pairs(
    pytest.mark.parametrize("shape", [(2, 12, 24), (3, 7, 15), (2, 48, 36), (4, 16, 1)], ids=str),
    layouts,
    pytest.mark.parametrize("out_layout", ["contiguous", "same"]),
    dtypes,
)
def test_layouts(
    emulator: GatherEmulator, shape: tuple[int, int, int], layout: str, out_layout: str, dtype: torch.dtype
) -> None:
    """Layouts change addresses, not values; the sums over positions alone are added up in another order."""
    case = _case(shape, dtype)
    expected = _run(emulator, case)
    emulator.out_layout = layout if out_layout == "same" else out_layout
    moved = case | {name: laid_out(case[name], layout) for name in ("x", "net_out", "grad", "added")}
    for got, values in zip(_run(emulator, moved), expected, strict=True):
        assert_only_written(got)
        if got.dim() == 1:
            assert_close(got / shape[2], values / shape[2])
        else:
            assert torch.equal(got, values)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(2, 4, 20), (3, 7, 15)], ids=str)
def test_16_bit_nets(emulator: GatherEmulator, shape: tuple[int, int, int], half: torch.dtype) -> None:
    """The net's output enters as the numbers that it is; its gradient is rounded once, to nearest."""
    case = _case(shape)
    narrow = case | {"net_out": case["net_out"].to(half)}
    wide = case | {"net_out": narrow["net_out"].float()}
    for got, values in zip(_run(emulator, narrow), _run(emulator, wide), strict=True):
        assert torch.equal(got, values.to(got.dtype))


@dtypes
@pytest.mark.parametrize("channels_last", [False, True])
def test_squeezed(emulator: GatherEmulator, channels_last: bool, dtype: torch.dtype) -> None:
    """Images are squeezed as they are read, and unsqueezed as they are written."""
    image = torch.randn(2, 3, 6, 8, dtype=dtype)
    image = image.to(memory_format=torch.channels_last) if channels_last else image
    scale, offset, index = gather_case(12, dtype)
    out, _ = emulator.gather(image, Gather(scale, index, offset))
    assert_close(out, reference.channel_mix(image, scale, offset, True, index).flatten(2))
    grad_out = torch.randn_like(out)
    grad_in = torch.full_like(image, torch.nan)
    grads = emulator.gather_backward(image, Gather(scale, index), grad_out, grad_in=grad_in)
    leaves = [t.clone().requires_grad_() for t in (image, scale)]
    mixed = reference.channel_mix(leaves[0], leaves[1], offset, True, index)
    expected = torch.autograd.grad((mixed.flatten(2) * grad_out).sum(), leaves)
    assert_close(grads.grad_in, expected[0])
    assert_close(grads.grad_scale, expected[1], condition=24.0)
    back = torch.full_like(image, torch.nan)
    emulator.gather(out, Gather(scale, index, None, offset), out=back)
    unmixed = reference.channel_unmix(out.unflatten(2, (3, 4)), scale, offset, True, index)
    assert_close(back, unmixed)


@dtypes
@pytest.mark.parametrize("shape", [(3, 12, 700), (2, 40, 33)], ids=str)
def test_any_order_of_threads_gives_the_same_bits(
    emulator: GatherEmulator, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    case = _case(shape, dtype)
    for layout in ("contiguous", "channels_last"):
        moved = case | {name: laid_out(case[name], layout) for name in ("x", "net_out", "grad", "added")}
        emulator.seed = 0
        first = _run(emulator, moved)
        for seed in (1, 12345):
            emulator.seed = seed
            assert all(map(torch.equal, _run(emulator, moved), first))


@pytest.mark.parametrize("shape", [(70, 2, 1), (5, 4, 100), (1, 3, 70_001), (601, 2, 101)], ids=str)
@directions
def test_log_det_of_every_sample(emulator: GatherEmulator, shape: tuple[int, int, int], inverse: bool) -> None:
    """log_det counts each position once, whatever the parts are. With exp, log s is the net's own output."""
    spec = CouplingSpec(scale_map="exp")
    x, net_out = coupling_case(shape, spec, torch.float32)
    half = net_out.shape[1] // 2
    net_out = torch.randint_like(net_out, -3, 4)
    net_out[:, :half] = 0.0
    _, log_det = emulator.gather(
        torch.zeros_like(x), Gather(*gather_case(shape[1], x.dtype)[::2]), net_out, spec, inverse
    )
    expected = net_out[:, half:].double().sum((1, 2))
    assert log_det is not None
    assert torch.equal(log_det.double(), -expected if inverse else expected)  # small whole numbers: exact in any order


def test_sums_of_many_positions(emulator: GatherEmulator) -> None:
    """Several shares of the positions for each channel; whole numbers add up exactly."""
    x = torch.randint(-3, 4, (3, 3, 40_000)).float()
    grad = torch.randint(-3, 4, x.shape).float()
    for layout in ("contiguous", "channels_last"):
        inputs = laid_out(x, layout), Gather(torch.ones(3), torch.tensor([2, 0, 1])), laid_out(grad, layout)
        grads = emulator.gather_backward(*inputs)
        assert torch.equal(grads.grad_scale, (grad * x[:, [2, 0, 1]]).sum((0, 2)))
        assert torch.equal(grads.grad_offset, grad.sum((0, 2)))


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_an_index_that_names_no_channel_shows(emulator: GatherEmulator, wrong: int) -> None:
    """The host does not look at it: NaN comes of its channel, and no memory but the tensors' is touched."""
    case = _case((2, 4, 12))
    case["index"] = torch.tensor([1, wrong, 0, 3])
    gather = Gather(case["scale"], case["index"], case["offset"])
    out, _ = emulator.gather(case["x"], gather, case["net_out"])
    step = emulator.step_gather_backward(case["x"], gather, case["net_out"], case["grad"], case["grad_log_det"], SPEC)
    grads = emulator.gather_backward(case["x"], gather, case["grad"])
    for found in (out.isnan().all(2).all(0), step.x.isnan().all(2).all(0), grads.grad_scale.isnan()):
        assert found.tolist() == [False, True, False, False]


def test_what_is_not_finite_stays_in_its_channel(emulator: GatherEmulator) -> None:
    """A product would spread it to all."""
    x = torch.zeros(1, 4, 8)
    x[0, 3, 5] = torch.inf
    out, _ = emulator.gather(x, Gather(torch.ones(4), torch.tensor([1, 3, 0, 2]), torch.zeros(4)))
    assert out[0, 1, 5].isinf()
    assert int(out.isfinite().sum()) == out.numel() - 1


def test_no_positions_and_no_channels(emulator: GatherEmulator) -> None:
    """Sums are zero where there is nothing to add up, and so is log_det."""
    gather = Gather(torch.ones(4), torch.arange(4))
    empty = allocate("contiguous", (2, 4, 0), torch.float32)
    grads = emulator.gather_backward(empty, gather, empty)
    assert not grads.grad_scale.any()
    assert not grads.grad_offset.any()
    nothing = torch.empty(3, 0, 5)
    _, log_det = emulator.gather(
        nothing, Gather(torch.empty(0), torch.empty(0, dtype=torch.int64)), nothing, MAPS["additive"]
    )
    assert log_det is not None
    assert torch.equal(log_det, torch.zeros(3))
