"""What the tests measure with: tolerances that follow from the arithmetic, and what makes a map a bijection.

A check that cannot fail proves nothing: tests/test_helpers.py shows of those that decide what is equal that they can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Roundings that follow each other on the way from an input to an output of the tiny models here (steps of a level,
# layers of a net, each a short sum): an upper bound, and a constant so that nobody tunes it test by test.
CHAINED_OPERATIONS = 64
# To the bit: tensors, and sequences and dicts of them.
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def tolerance(n_values: int = 1, condition: float = 1.0, dtype: torch.dtype = torch.float64) -> float:
    """Relative rounding error of a chain of operations on ``n_values`` values: CHAINED_OPERATIONS n condition eps.

    A sum of n terms loses at most n eps of its size and a map amplifies what comes in by at most its condition number.
    In float64 this is 1e-14 to 1e-10 here, where a wrong term shows as 1e-3 or more.
    """
    return CHAINED_OPERATIONS * n_values * condition * torch.finfo(dtype).eps


def assert_close(actual: Any, expected: Any, condition: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Check that values are equal up to rounding, relative to the largest expected one (or to 1 if all are smaller).

    The terms of the bound are counted per sample, values along dimension 0 being independent. ``dtype`` is the least
    precise one on the way, that of ``actual`` if None. Of several tensors each is compared by itself.
    """
    if not isinstance(expected, Tensor):
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, condition, dtype)
        return
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach(), expected.detach()
    n_values = math.prod(expected.shape[1:])
    bound = tolerance(n_values, condition, dtype or actual.dtype)
    assert bound < 1e-2, f"a bound of {bound:.1e} decides nothing: take a smaller or better conditioned case"
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1.0))
    assert error <= bound, f"relative error {error:.2e}, bound {bound:.2e}"


def assert_kernel_close(actual: Tensor, plain: Tensor, exact: Tensor, magnitude: float = 0.0) -> None:
    """Check that the error is at most twice that of plain torch in the same dtype, both against float64 (``exact``).

    The floor of 4 eps of the largest value is for the cases where plain torch happens to be exact; ``magnitude`` is
    that of the terms where the result is a sum that cancels. In float64, where there is nothing more precise to compare
    with, the bound is that of :func:`assert_close`.
    """
    assert actual.dtype == plain.dtype, f"dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == exact.shape == plain.shape, f"shapes {actual.shape}, {plain.shape}, {exact.shape}"
    assert exact.dtype == torch.float64
    if actual.dtype == torch.float64:
        assert_close(actual, exact)
        return
    if not exact.numel():
        return
    error, plain_error = (float((x.detach().double() - exact.detach()).abs().max()) for x in (actual, plain))
    floor = 4.0 * torch.finfo(actual.dtype).eps * max(float(exact.detach().abs().max()), magnitude)
    assert error <= 2.0 * plain_error + floor, f"error {error:.2e}, plain torch {plain_error:.2e}, floor {floor:.2e}"


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of what a layer or a model takes or returns, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def jacobian(function: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """d function(x, *others)[n] / d x[n] for each sample n, (N, D_out, D_in), by autograd.

    The outputs of a sample must depend on that sample alone: then one backward pass over as many copies of the batch as
    there are outputs gives all rows at once.
    """
    with torch.no_grad():
        n_outputs = math.prod(function(x, *others).shape[1:])
    copies = [None if value is None else value.detach().repeat_interleave(n_outputs, 0) for value in (x, *others)]
    leaf = copies[0].requires_grad_()
    outputs = function(leaf, *copies[1:]).flatten(1)
    rows = torch.eye(n_outputs, dtype=x.dtype, device=x.device).repeat(x.shape[0], 1)
    (gradient,) = torch.autograd.grad(outputs, leaf, rows)
    return gradient.reshape(x.shape[0], n_outputs, -1)


def assert_bijection(layer: nn.Module, x: Tensor, cond: Tensor | None = None) -> None:
    """Check that forward and inverse are inverses, and that both log_dets are those of their Jacobians. Float64.

    Checked: the shape (N,) of log_det; log_det = log|det dz/dx| per sample; inverse(forward(x)) = x and
    forward(inverse(x)) = x, so the map is onto as well; inverse log_det = -log_det; d inverse/dz = (dz/dx)^-1, which
    also tests the gradient of the inverse.
    """
    assert x.dtype == torch.float64
    n, n_values = x.shape[0], math.prod(x.shape[1:])
    before = x.clone()
    z, log_det = layer(x, cond)
    assert z.dtype == log_det.dtype == torch.float64
    assert log_det.shape == (n,), f"log_det has shape {tuple(log_det.shape)}, expected ({n},)"
    assert math.prod(z.shape[1:]) == n_values, f"{tuple(x.shape)} became {tuple(z.shape)}"

    forward_jacobian = jacobian(lambda *inputs: layer(*inputs)[0], x, cond)
    condition = float(torch.linalg.cond(forward_jacobian).max())
    # Per dimension: log_det is a sum over the values of a sample.
    log_abs_det = torch.linalg.slogdet(forward_jacobian).logabsdet
    assert_close(log_det / n_values, log_abs_det / n_values, condition * n_values)

    x_again, inverse_log_det = layer.inverse(z, cond)
    assert_close(x_again, x, condition * max(1.0, float(z.detach().abs().max())))
    assert_close(inverse_log_det / n_values, -log_det / n_values, condition * n_values)

    inverse_jacobian = jacobian(lambda *inputs: layer.inverse(*inputs)[0], z, cond)
    identity = torch.eye(n_values, dtype=x.dtype, device=x.device).expand(n, -1, -1)
    assert_close((inverse_jacobian @ forward_jacobian).flatten(1), identity.flatten(1), condition)

    latent = torch.randn_like(z)
    decoded, _ = layer.inverse(latent, cond)
    condition = float(torch.linalg.cond(jacobian(lambda *inputs: layer(*inputs)[0], decoded, cond)).max())
    assert_close(layer(decoded, cond)[0], latent, condition * max(1.0, float(decoded.detach().abs().max())))
    assert torch.equal(x, before), "the input was changed"


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (N, C, *spatial) in other memory, which is NaN between and beside them.

    Args:
        x: any tensor of two or more dimensions.
        layout: "contiguous"; "channels_last"; "channel_slice": the middle channels of a larger contiguous tensor;
            "channels_last_slice": the same of a channels-last one; "ragged_samples": a gap of one element after each
            sample; "offset": contiguous, but starting one element after a 16-byte boundary; "strided": every second
            element along every dimension; "batch_innermost"; "channels_inside": between the spatial dimensions, so that
            no single stride walks the positions; "transposed": the last two dimensions exchanged.
    """
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout.endswith("slice"):
        beside = x.new_full((x.shape[0], 4, *x.shape[2:]), torch.nan)
        whole = torch.cat([beside, x, beside], dim=1)
        return (whole if layout == "channel_slice" else laid_out(whole, "channels_last"))[:, 4:-4]
    if layout == "ragged_samples":
        size = math.prod(x.shape[1:])
        return x.new_full((x.shape[0], size + 1), torch.nan)[:, :size].unflatten(1, x.shape[1:]).copy_(x)
    if layout == "offset":
        return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
    if layout == "strided":
        every_second = tuple([slice(1, None, 2)] * x.dim())
        return x.new_full([2 * size for size in x.shape], torch.nan)[every_second].copy_(x)
    if layout == "batch_innermost":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "channels_inside":
        return x.movedim(1, min(2, x.dim() - 1)).contiguous().movedim(min(2, x.dim() - 1), 1)
    if layout == "transposed":
        return x.mT.contiguous().mT
    assert layout == "contiguous"
    return x.contiguous()


def memory_layouts(x: Tensor) -> dict[str, Tensor]:
    """Lay out the values in each way that keeps no single stride, or another order of the dimensions."""
    names = ["strided", "batch_innermost", "offset"]
    if x.dim() >= 4 and x.numel():
        names += ["channels_inside", "channels_last"]
    return {name: laid_out(x, name) for name in names}
