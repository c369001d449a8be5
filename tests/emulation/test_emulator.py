"""What only the emulator shows of the CUDA kernels: large grids, the order of threads, far memory, odd indices.

The values of all kernels, and that nothing beside an output is written, are the business of tests/kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.covering import pairs
from support.emulator import EmulatedOps, Room
from support.inverse_cases import assert_inverses, rotations
from support.kernel_cases import Case, Kernels, codes, dtypes, laid_out, layouts, option, same_values, shapes
from support.sparse_memory import SparseMemory
from torch import Tensor, float32, float64

from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.full
SPEC, ADDITIVE, EXP = CouplingSpec(), CouplingSpec("additive"), CouplingSpec(scale_map="exp")


@pytest.fixture
def kernels(_library: Path) -> Kernels:
    return Kernels(EmulatedOps(_library))


def check_maps(case: Case) -> None:
    """Channel maps by a matrix and by a gather, against the reference."""
    for matrix, offset, index in case.maps:
        case.kernels.check("channel_mix", case.x, matrix, offset, True, 0, index)
        arguments = (case.x, case.grad, matrix, offset, case.added, False, index)
        case.kernels.check("channel_mix_backward", *arguments)


def check_couplings(case: Case, maps: Sequence[Any]) -> None:
    """Couplings alone and in one pass with these maps, against the reference."""
    inputs = (case.x, case.net_out, case.grad, case.grad_log_det)
    for inverse in (False, True):
        case.kernels.check("coupling", *inputs[:2], *codes(case.spec, inverse), condition=100.0)
        case.kernels.check("coupling_backward", *inputs, *codes(case.spec, inverse), True, condition=100.0)
        for matrix, offset, index in maps:
            arguments = (*inputs[:2], matrix, offset, *codes(case.spec, inverse), index)
            case.kernels.check("coupling_mix", *arguments, condition=100.0)
    for matrix, offset, index in maps:
        arguments = (*inputs, matrix, *codes(case.spec), case.added, index)
        case.kernels.check("coupling_mix_backward", *arguments, condition=100.0)
        arguments = (*inputs, matrix, offset, *codes(case.spec), index)
        case.kernels.check("step_backward", *arguments, condition=100.0)


def check_densities(case: Case) -> None:
    values = (case.x, case.grad, 0.5 * case.grad)
    case.kernels.check("gaussian_log_prob", *values, condition=1000.0)
    case.kernels.check("gaussian_log_prob_backward", *values, case.grad_log_det, condition=1000.0)
    case.kernels.check("gaussian_sample", *values)


# ---- Grids ----


@pairs(dtypes, shapes, layouts)
def test_wide_tiles(kernels: Kernels, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Small grids are cut further for a large GPU, as everywhere else here; not for one of a single multiprocessor."""
    kernels.home.multiprocessors = 1
    case = Case(kernels, shape, dtype, SPEC).in_layout(layout)
    check_maps(case)
    check_couplings(case, case.maps[:1])


@pytest.mark.parametrize("shape", [(2600, 2, 1), (1, 1, 300_000), (2600, 1, 3), (2, 2600, 3)], ids=str)
def test_more_work_than_blocks(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """Grids are limited, so blocks loop; the sums of many positions are split."""
    case = Case(kernels, shape, float32, SPEC)
    check_densities(case)
    if shape[1] < 100:
        check_maps(case)
        check_couplings(case, case.maps)


def test_more_tiles_than_blocks(kernels: Kernels) -> None:
    """A block that walks several tiles brings the weights of every chunk of channels, here two, for each of them."""
    matrix, offset, _ = kernels.channel_map(17, float64, False)
    kernels.check("channel_mix", kernels.randn((1, 17, 2304 * 128 + 1), float64), matrix, offset, False, 0)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 309, 673), float64), ((1, 1450, 8), float32), ((1, 768, 20), float32)], ids=str
)
def test_many_channels(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Partial sums of grad_M are capped at 16 MB, as the driver checks.

    Of 309 channels that is a split fewer than there are tiles, and more sums than one round of a grid adds up over the
    splits; of 1450 it is one split, which writes the result.
    """
    case = Case(kernels, shape, dtype, SPEC)
    check_maps(case)
    if shape[1] == 768:
        check_couplings(case, case.maps[:1])


@pytest.mark.parametrize("channels", [4, 16, 32, 128])
def test_shared_memory_of_the_widest_tiles(kernels: Kernels, channels: int) -> None:
    """No whole vectors, gradients in two parts, tiles enough for a large GPU: more than 48 KB would be refused."""
    case = Case(kernels, (1, channels, 263 * 256 + 1 if channels == 32 else 70_001 // channels), float32, ADDITIVE)
    check_maps(case)
    check_couplings(case, case.maps[:1])


# Samples in one tile, tiles in one sample, samples that end within tiles; and more tiles than blocks, so that blocks
# walk ranges of tiles with samples that lie within one, in two and in many of them.
LOG_DET_SHAPES = [(70, 2, 1, 1), (33, 3, 7, 1), (5, 4, 10, 10), (2, 4, 32, 32), (7, 4, 3, 100), (1, 130, 400, 100)]
LOG_DET_SHAPES += [(2600, 2, 10, 10), (3, 2, 700_001, 1), (601, 2, 91, 11), (601, 4, 25, 4), (1, 4, 17_501, 4)]


@pairs(
    option("shape", LOG_DET_SHAPES),
    option("layout", ["contiguous", "channels_last"]),
    option("inverse", [False, True]),
    option("multiprocessors", [1, 132]),
)
def test_log_det_of_every_sample(
    kernels: Kernels, shape: tuple[int, ...], layout: str, inverse: bool, multiprocessors: int
) -> None:
    """log_det counts each position once, whatever the tiles are. With exp, log s is the net's own output."""
    kernels.home.multiprocessors = multiprocessors
    x, net_out = torch.zeros(shape), kernels.net_out(shape, EXP, float32)
    half = net_out.shape[1] // 2
    net_out = torch.randint_like(net_out, -3, 4)
    net_out[:, :half] = 0.0
    expected = net_out[:, half:].double().sum((1, 2, 3)) * (-1 if inverse else 1)  # whole numbers: exact in any order
    net_out = laid_out(net_out, layout)
    found = [kernels("coupling", x, net_out, *codes(EXP, inverse))[1]]
    for by_index in (False, True):
        matrix, offset, index = kernels.channel_map(shape[1], float32, by_index)
        found.append(kernels("coupling_mix", x, net_out, matrix, offset, *codes(EXP, inverse), index)[1])
    for log_det in found:
        assert torch.equal(log_det.double(), expected)


def test_sums_of_many_positions(kernels: Kernels) -> None:
    """Several shares of the positions for each channel; whole numbers add up exactly."""
    x, grad = (torch.randint(-3, 4, (3, 3, 200, 200)).float() for _ in range(2))
    index = torch.tensor([2, 0, 1])
    for layout in ("contiguous", "channels_last"):
        inputs = laid_out(x, layout), laid_out(grad, layout), torch.ones(3), None, None, False, index
        _, grad_scale, grad_offset = kernels("channel_mix_backward", *inputs)
        assert torch.equal(grad_scale, (grad * x[:, index]).sum((0, 2, 3)))
        assert torch.equal(grad_offset, grad.sum((0, 2, 3)))


def test_more_matrices_than_blocks_and_than_scratch_memory(kernels: Kernels) -> None:
    """The last one of many is no other than if it were alone; 16 MB are room for 227 of the large ones."""
    matrices = rotations(2600, 3).float()
    found = kernels("invert_matrices", matrices)
    for k in (0, 2303, 2304, 2599):
        alone = kernels("invert_matrices", matrices[k : k + 1].clone())
        assert all(torch.equal(value[k : k + 1], own) for value, own in zip(found, alone, strict=True))
    matrices = rotations(1, 96).float() * torch.arange(1.0, 231.0)[:, None, None]
    inverses, log_dets = kernels("invert_matrices", matrices)
    assert_inverses(matrices[225:], inverses[225:], log_dets[225:])


# ---- The order of threads ----


@pairs(
    dtypes,
    option("shape", [(3, 12, 20, 35), (2, 7, 9, 37), (1, 70, 9, 10), (1, 76, 7, 12)]),
    option("layout", ["contiguous", "channels_last"]),
    option("net_layout", ["contiguous", "channels_last"]),
)
def test_any_order_of_threads_gives_the_same_bits(
    kernels: Kernels, shape: tuple[int, ...], layout: str, net_layout: str, dtype: torch.dtype
) -> None:
    case = Case(kernels, shape, dtype, SPEC).in_layout(layout)
    case = case.replaced(net_out=laid_out(case.net_out.contiguous(), net_layout))
    results = []
    for seed in (0, 1, 12345):
        kernels.home.seed = seed
        results.append(case.of_all())
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("channels", [12, 80])
def test_any_order_of_threads_gives_the_same_inverses(kernels: Kernels, channels: int) -> None:
    """Several rows of matrices of signs have the largest pivot: of equals the first is taken."""
    matrices = torch.cat([rotations(1, channels), torch.randn(1, channels, channels).sign().double()])
    results = []
    for seed in (0, 1, 2, 12345):
        kernels.home.seed = seed
        results.append(kernels("invert_matrices", matrices))
        assert_inverses(matrices, *results[-1])
        assert all(map(torch.equal, results[-1], results[0]))


# ---- Memory ----


@pytest.mark.parametrize("dim", ["sample", "channel", "position"])
def test_offsets_beyond_32_bits(kernels: Kernels, dim: str) -> None:
    """The elements lie more than 2^31 apart, of what is read and of what is written."""
    case = Case(kernels, (3, 4, 2, 3), float32, SPEC)
    expected = case.of_all()
    memory, names = SparseMemory(float32, tensors=64), ("x", "grad", "net_out", "added")
    far = case.replaced(**{name: memory.far(getattr(case, name), dim) for name in names})
    same_values(far.of_all(), expected)
    kernels.home.made = lambda x: memory.far(torch.full(x.shape, torch.nan), dim)
    same_values(far.of_all(), expected)


@pytest.mark.parametrize("dim", ["sample", "channel", "position", "row"])
def test_images_beyond_32_bits(kernels: Kernels, dim: str) -> None:
    """Images that are squeezed as they are read, and whose gradient is written so."""
    image, grad, memory = (
        kernels.randn((3, 2, 4, 8), float32),
        kernels.randn((3, 8, 2, 4), float32),
        SparseMemory(float32),
    )
    matrix, offset, _ = kernels.channel_map(8, float32, False)
    expected = [
        *kernels("channel_mix", image, matrix, offset, False, 1),
        *kernels("channel_mix_backward", image, grad, matrix, None, None, True),
    ]
    far = memory.far(image, dim)
    found = kernels("channel_mix", far, matrix, offset, False, 1)
    kernels.home.made = lambda x: memory.far(torch.full(x.shape, torch.nan), dim)
    found += kernels("channel_mix_backward", far, grad, matrix, None, None, True)
    same_values(found, expected)


@pytest.mark.parametrize("net_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("wrong", [-1, 12, 2**40])
def test_an_index_that_names_no_channel_shows(kernels: Kernels, wrong: int, net_layout: str) -> None:
    """The host does not look at it: NaN comes of its channel, and no memory but the tensors' is touched."""
    kernels.home.whole = False  # the channel that nobody asks for has no gradient
    case = Case(kernels, (2, 12, 4, 5), float32, SPEC)
    net_out, index = laid_out(case.net_out, net_layout), torch.arange(12)
    index[9] = wrong
    scale, offset, grads = torch.ones(12), torch.zeros(12), (case.grad, case.grad_log_det)
    out, _ = kernels("coupling_mix", case.x, net_out, scale, offset, *codes(SPEC, False), index)
    step = kernels("step_backward", case.x, net_out, *grads, scale, offset, *codes(SPEC), index)[0]
    mixed = kernels("coupling_mix_backward", case.x, net_out, *grads, scale, *codes(SPEC), None, index)[2]
    for found in (out.isnan().all(3).all(2).all(0), step.isnan().all(3).all(2).all(0), mixed.isnan()):
        assert found.tolist() == [channel == 9 for channel in range(12)]


def test_the_checks_of_memory_reject() -> None:
    """An output that is not all written, or beside which something is, also where a NaN is its value."""
    for dtype in (float32, float64, torch.bfloat16, torch.float16):
        for last in (False, True):
            room = Room((2, 3, 4, 5), dtype, last)
            with pytest.raises(AssertionError, match="not written"):
                room.expect_only_written()
            room.tensor.fill_(torch.nan)
            room.expect_only_written()
            assert room.tensor.is_contiguous(memory_format=torch.channels_last) == last
            base: Tensor = room.tensor._base if room.tensor._base is not None else room.tensor
            base.view(torch.int16).flatten()[0] = 1
            with pytest.raises(AssertionError, match="beside"):
                room.expect_only_written()
