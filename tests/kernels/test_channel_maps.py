"""Channel maps, by a matrix or a permutation: values, gradients, squeezing on the way, inverses of matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernels.kernel_cases import Kernels, dtypes, gathers, layouts, option, shapes
from support.covering import pairs
from support.helpers import assert_kernel_close
from support.inverse_cases import IRREGULAR, MATRICES, assert_inverses, rotations, with_condition
from torch import Tensor, float32, float64

from pyglow_fast import functional, reference
from pyglow_fast.functional import ops

# (N, C, H, W) of images before squeezing.
IMAGES = [(2, 3, 8, 8), (1, 1, 2, 2), (3, 2, 6, 10), (2, 3, 34, 66), (1, 12, 4, 30), (1, 50, 4, 16), (1, 34, 6, 8)]
IMAGES += [(2, 3, 2, 600), (0, 3, 4, 4), (2, 3, 0, 4)]
images = option("image", IMAGES)


@pairs(
    dtypes,
    shapes,
    layouts,
    option("grad_layout", ["contiguous", "same"]),
    gathers,
    option("centred", [False, True]),
    option("added", [None, "contiguous", "same", "channels_last", "offset", "ragged_samples"]),
)
def test_channel_mix_and_its_gradients(
    kernels: Kernels,
    shape: tuple[int, ...],
    layout: str,
    grad_layout: str,
    gathers: bool,
    centred: bool,
    added: str | None,
    dtype: torch.dtype,
) -> None:
    """``added``: the layout of what a net's backward adds to the gradient of the first channels, which has its own."""
    matrix, offset, index = kernels.channel_map(shape[1], dtype, gathers)
    x = kernels.randn(shape, dtype, layout)
    kernels.check("channel_mix", x, matrix, offset, centred, 0, index)
    grad = kernels.randn(shape, dtype, layout if grad_layout == "same" else grad_layout)
    first = (shape[0], shape[1] // 2, *shape[2:])
    part = None if added is None else kernels.randn(first, dtype, layout if added == "same" else added)
    kernels.check("channel_mix_backward", x, grad, matrix, offset if centred else None, part, False, index)


@pairs(dtypes, images, layouts, option("other_layout", ["contiguous", "channels_last"]), gathers)
def test_squeezed(
    kernels: Kernels, image: tuple[int, ...], layout: str, other_layout: str, gathers: bool, dtype: torch.dtype
) -> None:
    """Images are squeezed as they are read, by any strides of rows and columns, and unsqueezed as they are written."""
    n, c, h, w = image
    squeezed = (n, 4 * c, h // 2, w // 2)
    matrix, offset, index = kernels.channel_map(4 * c, dtype, gathers)
    x, u = kernels.randn(image, dtype, layout), kernels.randn(squeezed, dtype, layout)
    kernels.check("channel_mix", x, matrix, offset, False, ops.SQUEEZE_CODES["input"], index)
    kernels.check("channel_mix", u, matrix, offset, True, ops.SQUEEZE_CODES["output"], index)
    grad, added = kernels.randn(squeezed, dtype, other_layout), kernels.randn((n, 2 * c, h // 2, w // 2), dtype)
    kernels.check("channel_mix_backward", x, grad, matrix, None, added if w % 4 else None, True, index)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_comes_through(kernels: Kernels, value: float) -> None:
    """A product spreads it over all channels of its position, a gather leaves it in its channel."""
    x = kernels.randn((1, 4, 37), torch.float32)
    x[0, 3, 36] = value
    (mixed,) = kernels("channel_mix", x, torch.ones(4, 4).to(x), torch.zeros(4).to(x), False, 0)
    assert not mixed[0, :, 36].isfinite().any()
    assert mixed[0, :, :36].isfinite().all()
    index = torch.tensor([1, 3, 0, 2], device=x.device)
    (gathered,) = kernels("channel_mix", x, torch.ones(4).to(x), torch.zeros(4).to(x), False, 0, index)
    assert (~gathered.isfinite()).nonzero().tolist() == [[0, 1, 36]]


@pytest.mark.parametrize("shape", [(2, 12, 33, 40), (2, 48, 16, 12), (4, 130, 3, 5)], ids=str)
def test_offset_costs_no_precision(kernels: Kernels, shape: tuple[int, ...]) -> None:
    """The offset is added to the finished sum: in front of it every rounding would be one of the offset's size."""
    matrix, offset, _ = kernels.channel_map(shape[1], torch.float32, False)
    x = kernels.randn(shape, torch.float32)
    exact, plain = (reference.channel_mix(*(v.cpu().to(d) for v in (x, matrix, offset))) for d in (float64, float32))
    errors = [
        float((u.cpu().double() - exact).square().mean().sqrt())
        for u in (*kernels("channel_mix", x, matrix, offset, False, 0), plain)
    ]
    assert errors[0] <= 2.0 * errors[1], f"root mean square errors: {errors[0]:.2e}, plain torch {errors[1]:.2e}"


# ---- Inverses of matrices ----

# Less than a panel, whole panels, one column more, whole and ragged warps; on a GPU in scratch memory from 77 on.
CHANNELS = [1, 2, 5, 8, 9, 12, 24, 33, 48, 76, 77, 130]


@pairs(dtypes, option("channels", CHANNELS), option("name", [*MATRICES]))
def test_inverses(kernels: Kernels, name: str, channels: int, dtype: torch.dtype) -> None:
    """Against inverses of extended precision."""
    matrices = MATRICES[name](2, channels).to(kernels.device, dtype)
    assert_inverses(matrices, *kernels("invert_matrices", matrices))


@pairs(dtypes, option("channels", [2, 3, 12, 80]), option("name", [*IRREGULAR]))
def test_what_has_no_inverse_shows(kernels: Kernels, name: str, channels: int, dtype: torch.dtype) -> None:
    """NaN everywhere in the inverse of that matrix, and nothing in those beside it."""
    make, expected = IRREGULAR[name]
    regular = rotations(2, channels).to(kernels.device, dtype)
    matrices = torch.stack([regular[0], make(channels).to(regular), regular[1]])
    inverses, log_dets = kernels("invert_matrices", matrices)
    assert inverses[1].isnan().all()
    assert_inverses(regular, inverses[[0, 2]], log_dets[[0, 2]])
    torch.testing.assert_close(log_dets[1], torch.tensor(expected).to(regular), equal_nan=True)


@dtypes
@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0), (0, 0, 0)], ids=str)
def test_nothing_to_invert(kernels: Kernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The determinant of no rows is 1."""
    inverses, log_dets = kernels("invert_matrices", torch.empty(shape, dtype=dtype, device=kernels.device))
    assert inverses.shape == shape
    assert torch.equal(log_dets, torch.zeros_like(log_dets))
    assert log_dets.shape == shape[:1]


def test_inverses_of_views(kernels: Kernels) -> None:
    """Transposed, sliced and expanded matrices are what they look like."""
    base = rotations(3, 6).to(kernels.device)
    larger = torch.full((6, 9, 9), torch.nan).to(base)
    larger[::2, 2:8, 1:7] = base
    for view in (base.mT, larger[::2, 2:8, 1:7], base[:1].expand(3, -1, -1)):
        expected = kernels("invert_matrices", view.contiguous())
        assert all(map(torch.equal, kernels("invert_matrices", view), expected))


def test_a_wrong_inverse_is_found() -> None:
    """Rounded twice, or formed in float32, or transposed, or a log-det of another sign."""
    matrices = with_condition(1e4)(2, 24).float()
    inverses, log_dets = reference.invert_matrix(matrices), reference.log_abs_det(matrices.double()).float()
    assert_inverses(matrices, inverses, log_dets)
    wrong = [(inverses * (1.0 + 1e-6), log_dets), (inverses.mT, log_dets), (inverses, -log_dets)]
    for case in (*wrong, (torch.linalg.inv(matrices), log_dets), (inverses, log_dets + 1e-4)):
        with pytest.raises(AssertionError, match="bound"):
            assert_inverses(matrices, *case)


# ---- The functions over them ----


def test_second_derivatives_of_inverses(device: torch.device) -> None:
    matrices = rotations(2, 4).to(device).requires_grad_()
    for function in (functional.invert_matrix, functional.log_abs_det):
        assert torch.autograd.gradcheck(function, (matrices,))
        assert torch.autograd.gradgradcheck(function, (matrices,))


@pytest.mark.parametrize("shape", [(0, 0), (2, 0, 4, 4), (2, 3, 4, 4), (4, 4)], ids=str)
def test_inverses_of_any_number_of_matrices(shape: tuple[int, ...], device: torch.device) -> None:
    matrices = rotations(math.prod(shape[:-2]), shape[-1]).reshape(shape).to(device)
    identity = torch.eye(shape[-1]).to(matrices).expand(shape)
    torch.testing.assert_close(functional.invert_matrix(matrices) @ matrices, identity)
    log_dets = functional.log_abs_det(matrices)
    torch.testing.assert_close(log_dets, matrices.new_zeros(shape[:-2]))


def test_a_singular_matrix_among_others_is_refused() -> None:
    matrices = torch.stack([torch.eye(3), torch.zeros(3, 3)])
    with pytest.raises(ValueError, match="matrix: expected an invertible matrix, found a singular one"):
        functional.invert_matrix(matrices)
    assert functional.log_abs_det(matrices).tolist() == [0.0, -math.inf]
    with pytest.raises(ValueError, match="scale: expected scales that are not zero, found a zero"):
        reference.invert_gather(torch.tensor([1.0, 0.0]), torch.tensor([1, 0]))


@dtypes
@pytest.mark.parametrize("channels", [3, 12, 48, 96])
@pytest.mark.parametrize("name", ["invert_matrix", "log_abs_det"])
def test_gradients_of_inverses(name: str, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    matrices = with_condition(10.0)(3, channels).to(device, dtype)

    def gradient(home: Any, dtype: torch.dtype) -> Tensor:
        leaf = matrices.detach().to(dtype).clone().requires_grad_()
        out = getattr(home, name)(leaf)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return torch.autograd.grad(out, leaf, weight)[0]

    exact = gradient(reference, float64)
    # The inverse is rounded before the products, whose terms are this large.
    inverse = reference.invert_matrix(matrices.double()).abs()
    terms = inverse.mT @ torch.ones_like(inverse) @ inverse.mT if name == "invert_matrix" else inverse
    assert_kernel_close(gradient(functional, dtype), gradient(reference, dtype), exact, float(terms.max()))
