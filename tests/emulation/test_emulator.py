"""What only the emulator shows of the CUDA kernels: large grids, the order of threads, far memory, odd indices.

The values of all kernels, and that nothing beside an output is written, are the business of tests/kernels.
"""

from __future__ import annotations

import pytest
import torch
from emulation.emulator import Room
from kernels.kernel_cases import Case, Kernels, codes, dtypes, laid_out, option, same_values
from support.covering import pairs
from support.inverse_cases import assert_inverses, rotations
from support.sparse_memory import SparseMemory
from torch import Tensor, float32, float64

from pyglow_fast import reference
from pyglow_fast.reference import CouplingSpec

pytestmark = pytest.mark.full
SPEC, ADDITIVE, EXP = CouplingSpec(), CouplingSpec("additive"), CouplingSpec(scale_map="exp")


# ---- Grids ----


# Vector path and tail; one block and several; several groups and chunks of channels; one sample to several tiles and
# several samples to a tile; nets' halves of 2, 6, 8 and 38 channels; two splits of the positions; matrices that are
# inverted in scratch memory.
GRIDS = [(1, 3, 1, 5), (2, 4, 4, 4), (2, 4, 3, 5), (1, 12, 12, 15), (3, 37, 2, 2), (1, 70, 2, 4), (2, 6, 4, 11)]
GRIDS += [(3, 16, 4, 5), (1, 76, 2, 4), (5, 6, 15, 16), (5, 6, 1, 241), (90, 2, 1, 1), (1, 6, 28, 43), (1, 80, 2, 4)]


@pairs(
    dtypes,
    option("shape", GRIDS),
    option("spec", [SPEC, ADDITIVE, CouplingSpec(order="scale_shift")]),
    option(
        "layout", ["contiguous", "channels_last", "channels_last_slice", "ragged_samples", "strided", "batch_innermost"]
    ),
    option("net_layout", ["contiguous", "channels_last"]),
    option("net", [None, torch.bfloat16, torch.float16]),
    option("multiprocessors", [1, 132]),
)
def test_small_grids(
    kernels: Kernels,
    shape: tuple[int, ...],
    spec: CouplingSpec,
    layout: str,
    net_layout: str,
    net: torch.dtype | None,
    multiprocessors: int,
    dtype: torch.dtype,
) -> None:
    """Every kernel, and where there are channels for it squeezed. Small ones are cut further for a large GPU.

    The sanitizers watch these, in the order of threads that shows missing barriers.
    """
    kernels.home.multiprocessors, kernels.home.seed = multiprocessors, 3
    case = Case(kernels, shape, dtype, spec).in_layout(layout)
    net_out = case.net_out if net is None or dtype == float64 else case.net_out.to(net)
    case = case.replaced(net_out=laid_out(net_out.contiguous(), net_layout))
    case.check(case.calls())
    if shape[1] % 4 == 0:
        image = kernels.randn((shape[0], shape[1] // 4, 2 * shape[2], 2 * shape[3]), dtype, layout)
        for matrix, offset, index in case.maps:
            kernels.check("channel_mix", image, matrix, offset, False, 1, index)
            kernels.check("channel_mix", case.x, matrix, offset, True, 2, index)
            kernels.check("channel_mix_backward", image, case.grad, matrix, None, case.added, True, index)
    own = case.net_out.dtype
    rows, _ = kernels("patches", case.net_out, (1, 1), (1, 1), True, own)
    (same,) = kernels("tap_sums", rows, None, case.net_out.shape, (1, 1), (1, 1), False, own)
    assert torch.equal(same, case.net_out)
    rows, _ = kernels("patches", case.x, (3, 3), (1, 2), False, own)
    (sums,) = kernels("relu_backward", torch.ones_like(rows), rows)
    assert torch.equal(sums.sum(0), (rows > 0).sum(0).to(sums.dtype))
    matrices = rotations(3, shape[1]).to(dtype)
    assert_inverses(matrices, *kernels("invert_matrices", matrices))


@pytest.mark.parametrize("shape", [(2600, 2, 1), (1, 1, 300_000), (2600, 1, 3), (2, 2600, 3)], ids=str)
def test_more_work_than_blocks(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """Grids are limited, so blocks loop; the sums of many positions are split."""
    case = Case(kernels, shape, float32, SPEC)
    case.check(case.calls() if shape[1] < 100 else case.density_calls())


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
    case.check(case.map_calls())
    if shape[1] == 768:
        case.check(case.coupling_calls(case.maps[:1]))


@pytest.mark.parametrize("channels", [4, 16, 32, 128])
def test_shared_memory_of_the_widest_tiles(kernels: Kernels, channels: int) -> None:
    """No whole vectors, gradients in two parts, tiles enough for a large GPU: more than 48 KB would be refused."""
    case = Case(kernels, (1, channels, 263 * 256 + 1 if channels == 32 else 70_001 // channels), float32, ADDITIVE)
    case.check(case.map_calls())
    case.check(case.coupling_calls(case.maps[:1]))


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


# ---- Folded maps ----


def folded(factors: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """The channel maps of convolutions in LU factors, as csrc/core.h describes them."""
    permutation, lower, upper, log_diag, sign_diag, log_scale, bias = (torch.stack(part) for part in factors)
    weight = reference.lu_weight(permutation, lower, upper, log_diag, sign_diag)
    return *reference.fold_actnorm(weight, log_scale, bias), log_diag.sum(1) + log_scale.sum(1)


def assert_rounded_once(actual: Tensor, truth: Tensor) -> None:
    """Relative to the largest value; in float64 the sums of the truth are rounded, too."""
    truth = truth.detach()
    roundings = 2 if actual.dtype == torch.float32 else 64 * truth.shape[-1]
    error = (actual.double() - truth).abs().max() / truth.abs().max().clamp(min=1.0)
    assert float(error) <= roundings * torch.finfo(actual.dtype).eps


@dtypes
@pytest.mark.parametrize(("count", "channels"), [(2, 1), (3, 12), (1, 70), (130, 2), (1, 300)])
def test_folded_maps(kernels: Kernels, count: int, channels: int, dtype: torch.dtype) -> None:
    """More maps than a launch takes, more channels than a block has threads; and the gradients of all factors."""
    size = channels, channels

    def drawn(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) / channels**0.5 for _ in range(count)]

    orders, signs = [torch.randperm(channels) for _ in range(count)], [torch.randn(channels).sign().to(dtype)] * count
    factors = [orders, drawn(*size), drawn(*size), drawn(channels), signs, drawn(channels), drawn(channels)]
    exact = [[part.double() if part.is_floating_point() else part for part in parts] for parts in factors]
    leaves = [part.requires_grad_() for i in (1, 2, 3, 5, 6) for part in exact[i]]
    expected = folded(exact)
    found = kernels.home.fold(factors)
    for actual, truth in zip(found, expected, strict=True):
        assert_rounded_once(actual, truth)
    grads = [torch.randn_like(part) for part in found]
    wanted = torch.autograd.grad(expected, leaves, [grad.double() for grad in grads])
    gradients = kernels.home.fold_backward(factors, grads)
    for actual, first in zip(gradients, range(0, len(wanted), count), strict=True):
        assert_rounded_once(actual, torch.stack(wanted[first : first + count]))


# ---- The order of threads ----


@pairs(
    dtypes,
    option("shape", [(3, 12, 20, 35), (2, 7, 9, 37), (1, 70, 9, 10), (1, 76, 7, 12), (1, 80, 2, 4)]),
    option("layout", ["contiguous", "channels_last"]),
    option("net_layout", ["contiguous", "channels_last"]),
)
def test_any_order_of_threads_gives_the_same_bits(
    kernels: Kernels, shape: tuple[int, ...], layout: str, net_layout: str, dtype: torch.dtype
) -> None:
    """Several rows of matrices of signs have the largest pivot: of equals the first is taken."""
    case = Case(kernels, shape, dtype, SPEC).in_layout(layout)
    case = case.replaced(net_out=laid_out(case.net_out.contiguous(), net_layout))
    matrices = torch.cat([rotations(1, shape[1]), torch.randn(1, shape[1], shape[1]).sign().double()])
    results = []
    for seed in (0, 1, 2, 12345):
        kernels.home.seed = seed
        inverted = kernels("invert_matrices", matrices)
        assert_inverses(matrices, *inverted)
        results.append([*case.of(case.calls()), *inverted])
        assert all(map(torch.equal, results[-1], results[0]))


# ---- Memory ----


@pytest.mark.parametrize("dim", ["sample", "channel", "position"])
def test_offsets_beyond_32_bits(kernels: Kernels, dim: str) -> None:
    """The elements lie more than 2^31 apart, of what is read and of what is written."""
    case = Case(kernels, (3, 4, 2, 3), float32, SPEC)
    expected = case.of(case.calls())
    memory, names = SparseMemory(float32, tensors=64), ("x", "grad", "net_out", "added")
    far = case.replaced(**{name: memory.far(getattr(case, name), dim) for name in names})
    same_values(far.of(far.calls()), expected)
    kernels.home.made = lambda x: memory.far(torch.full(x.shape, torch.nan), dim)
    same_values(far.of(far.calls()), expected)


@pytest.mark.parametrize("dim", ["sample", "channel", "position", "row"])
def test_images_beyond_32_bits(kernels: Kernels, dim: str) -> None:
    """Images that are squeezed as they are read, and whose gradient is written so."""
    image, grad = kernels.randn((3, 2, 4, 8), float32), kernels.randn((3, 8, 2, 4), float32)
    memory = SparseMemory(float32)
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
        for layout in (torch.contiguous_format, torch.channels_last):
            room = Room(torch.empty(2, 3, 4, 5, dtype=dtype, device="meta", memory_format=layout))
            with pytest.raises(AssertionError, match="not written"):
                room.expect_only_written()
            room.tensor.fill_(torch.nan)
            room.expect_only_written()
            assert room.tensor.is_contiguous(memory_format=layout)
            base: Tensor = room.tensor._base if room.tensor._base is not None else room.tensor
            base.view(torch.int16).flatten()[0] = 1
            with pytest.raises(AssertionError, match="beside"):
                room.expect_only_written()
