"""Channel mixing that squeezes by its indexing, and gradients in two parts: the same bits as separate passes give."""

from __future__ import annotations

import pytest
import torch
from support.covering import pairs
from support.emulated_cases import cuts
from support.emulator import LAYOUTS, Emulator, assert_only_written, laid_out
from support.helpers import assert_kernel_close
from support.sparse_memory import SparseMemory
from torch import Tensor

from pyglow_fast import reference

DTYPES = [torch.float32, torch.float64]
# (N, C, H, W) after squeezing.
SHAPES = [
    (2, 4, 3, 5),
    (1, 12, 4, 8),  # whole vectors
    (2, 12, 5, 6),  # whole vectors of float64
    (1, 12, 9, 20),  # whole vectors and several tiles
    (3, 8, 1, 1),
    (2, 48, 2, 4),
    (1, 136, 3, 4),  # more channels than a block takes
    (1, 200, 2, 8),
    (2, 12, 1, 300),
    (0, 4, 3, 5),
    (2, 4, 0, 3),
]
IMAGE_LAYOUTS = ("contiguous", "channels_last", "channel_slice", "window", "offset", "strided")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
image_layouts = pytest.mark.parametrize("layout", IMAGE_LAYOUTS)


def images(layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Images (N, C / 4, 2 H, 2 W) of NaN that squeeze to ``shape``, laid out as :func:`emulator.allocate` would.

    "window": the inside of larger images, so that there is a gap between rows.
    """
    n, c, h, w = shape[0], shape[1] // 4, 2 * shape[2], 2 * shape[3]

    def full(*size: int) -> Tensor:
        return torch.full(size, torch.nan, dtype=dtype)

    if layout == "contiguous":
        return full(n, c, h, w)
    if layout == "channels_last":
        return full(n, h, w, c).permute(0, 3, 1, 2)
    if layout == "channel_slice":
        return full(n, c + 8, h, w)[:, 4 : c + 4]
    if layout == "window":
        return full(n, c, h + 2, w + 8)[:, :, 1 : h + 1, 4 : w + 4]
    if layout == "offset":
        return full(n * c * h * w + 1)[1:].view(n, c, h, w)
    assert layout == "strided"
    return full(2 * n, 2 * c, 2 * h, 2 * w)[::2, ::2, ::2, ::2]


def flat(x: Tensor) -> Tensor:
    return x.flatten(2).contiguous()


def mix_case(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, H, W), M, c."""
    c = shape[1]
    return torch.randn(shape, dtype=dtype), torch.randn(c, c, dtype=dtype) / c**0.5, torch.randn(c, dtype=dtype)


@pairs(
    dtypes,
    shapes,
    image_layouts,
    pytest.mark.parametrize("subtract_first", [False, True], ids=["mix", "unmix"]),
    cuts,
)
def test_squeeze_on_read(
    emulator: Emulator, shape: tuple[int, int, int, int], layout: str, subtract_first: bool, dtype: torch.dtype
) -> None:
    x, matrix, offset = mix_case(shape, dtype)
    before = images(layout, shape, dtype).copy_(reference.unsqueeze(x))
    u = emulator.channel_mix(before, matrix, offset, subtract_first)
    assert_only_written(u)
    assert torch.equal(u, emulator.channel_mix(flat(x), matrix, offset, subtract_first))
    function = reference.channel_unmix if subtract_first else reference.channel_mix
    inputs = (reference.squeeze(before), matrix, offset)
    assert_kernel_close(u, flat(function(*inputs)), flat(function(*(t.double() for t in inputs))))


@pairs(
    dtypes,
    shapes,
    image_layouts,
    cuts,
)
def test_unsqueeze_on_write(
    emulator: Emulator, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    x, matrix, offset = mix_case(shape, dtype)
    out = images(layout, shape, dtype)
    emulator.channel_mix(flat(x), matrix, offset, out=out)
    assert_only_written(out)
    assert torch.equal(flat(reference.squeeze(out)), emulator.channel_mix(flat(x), matrix, offset))


@pairs(
    dtypes,
    shapes,
    image_layouts,
    pytest.mark.parametrize("out_layout", ["contiguous", "same"]),
    cuts,
)
def test_squeezed_gradients(
    emulator: Emulator, shape: tuple[int, int, int, int], layout: str, out_layout: str, dtype: torch.dtype
) -> None:
    x, matrix, offset = mix_case(shape, dtype)
    grad_u = torch.randn_like(flat(x))
    expected = emulator.channel_mix_backward(flat(x), grad_u, matrix, offset)
    before = images(layout, shape, dtype).copy_(reference.unsqueeze(x))
    room = images(layout if out_layout == "same" else out_layout, shape, dtype)
    grad_x, *sums = emulator.channel_mix_backward(before, grad_u, matrix, offset, grad_x=room)
    assert_only_written(grad_x)
    assert torch.equal(flat(reference.squeeze(grad_x)), expected[0])
    for got, value in zip(sums, expected[1:], strict=True):
        assert_only_written(got)
        assert torch.equal(got, value)


@pairs(
    dtypes,
    pytest.mark.parametrize("shape", [(2, 12, 24), (1, 8, 160), (3, 7, 15), (4, 16, 1), (1, 140, 12)], ids=str),
    pytest.mark.parametrize("layout", LAYOUTS),
    pytest.mark.parametrize("added_layout", ["contiguous", "same"]),
    pytest.mark.parametrize("share", [0.0, 0.5, 1.0]),
    cuts,
)
def test_gradient_in_two_parts(
    emulator: Emulator, shape: tuple[int, int, int], layout: str, added_layout: str, share: float, dtype: torch.dtype
) -> None:
    n, c, p = shape
    added_channels = int(share * c)
    x, grad_u = (torch.randn(shape, dtype=dtype) for _ in range(2))
    matrix, added = torch.randn(c, c, dtype=dtype), torch.randn(n, added_channels, p, dtype=dtype)
    whole = grad_u.clone()
    whole[:, :added_channels] += added
    expected = emulator.channel_mix_backward(x, whole, matrix)
    added = laid_out(added, layout if added_layout == "same" else added_layout)
    actual = emulator.channel_mix_backward(x, laid_out(grad_u, layout), matrix, added=added)
    for got, value in zip(actual, expected, strict=True):
        assert_only_written(got)
        assert torch.equal(got, value)


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_part_in_its_own_layout(emulator: Emulator, layout: str, dtype: torch.dtype) -> None:
    """The second part need not have the whole vectors that all else has: the emulator refuses those not aligned."""
    x, grad_u, added = (torch.randn(2, channels, 24, dtype=dtype) for channels in (12, 12, 6))
    matrix = torch.randn(12, 12, dtype=dtype)
    expected = emulator.channel_mix_backward(x, grad_u, matrix, added=added)
    actual = emulator.channel_mix_backward(x, grad_u, matrix, added=laid_out(added, layout))
    for got, value in zip(actual, expected, strict=True):
        assert_only_written(got)
        assert torch.equal(got, value)


@pytest.mark.parametrize("channels", [4, 16, 32, 128])
def test_shared_memory_of_the_widest_tiles(emulator: Emulator, channels: int) -> None:
    """Two parts and no whole vectors take the most shared memory: the emulator refuses more than 48 KB."""
    x, grad_u = torch.randn(1, channels, 70_001 // channels), torch.randn(1, channels, 70_001 // channels)
    matrix, added = torch.randn(channels, channels), torch.randn(1, channels // 2, x.shape[2])
    whole = grad_u.clone()
    whole[:, : channels // 2] += added
    expected = emulator.channel_mix_backward(x, whole, matrix)
    for got, value in zip(emulator.channel_mix_backward(x, grad_u, matrix, added=added), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("dim", ["sample", "channel", "position", "row"])
def test_offsets_beyond_32_bits(emulator: Emulator, dim: str) -> None:
    """Samples, channels, pixels or rows lie more than 2^31 apart, of what is read and of what is written."""
    x, matrix, offset = mix_case((3, 8, 2, 4), torch.float32)
    grad_u, added = torch.randn_like(flat(x)), torch.randn(3, 4, 8)
    memory, room = SparseMemory(torch.float32), torch.full_like(reference.unsqueeze(x), torch.nan)
    held, out, grad_x = (memory.far(t, dim) for t in (reference.unsqueeze(x), room, room))
    expected = emulator.channel_mix(flat(x), matrix, offset)
    assert torch.equal(emulator.channel_mix(held, matrix, offset), expected)
    emulator.channel_mix(flat(x), matrix, offset, out=out)
    assert torch.equal(flat(reference.squeeze(out)), expected)
    grads = emulator.channel_mix_backward(flat(x), grad_u, matrix, added=added)
    grad_parts = [t if dim == "row" else memory.far(t, dim) for t in (grad_u, added)]
    got = emulator.channel_mix_backward(held, grad_parts[0], matrix, added=grad_parts[1], grad_x=grad_x)
    assert torch.equal(flat(reference.squeeze(grad_x)), grads[0])
    for actual, value in zip(got[1:], grads[1:], strict=True):
        assert torch.equal(actual, value)
