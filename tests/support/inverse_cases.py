"""Matrices to be inverted, their inverses in extended precision, and how far from these a result may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from support.helpers import tolerance


def _with(value: float, n: int) -> Tensor:
    """The identity with one other value in it."""
    matrix = torch.eye(n)
    matrix[n // 2, n - 1] = value
    return matrix


def _nan_beside_zeros(n: int) -> Tensor:
    """A column that is zero but for a NaN."""
    matrix = torch.eye(n)
    matrix[:, 0] = 0.0
    matrix[1, 0] = math.nan
    return matrix


# Matrices that are singular or not finite, and log|det| of them.
IRREGULAR: dict[str, tuple[Callable[[int], Tensor], float]] = {
    "zeros": (lambda n: torch.zeros(n, n), -math.inf),
    "equal rows": (lambda n: torch.ones(n, n) + torch.eye(n).mul(torch.arange(n).gt(1)), -math.inf),
    "a zero column": (lambda n: torch.eye(n).mul(torch.arange(n).ne(n - 1)), -math.inf),
    "nan": (lambda n: _with(math.nan, n), math.nan),
    "nan beside zeros": (_nan_beside_zeros, math.nan),
    "inf": (lambda n: _with(math.inf, n), math.nan),
}


def rotations(count: int, n: int) -> Tensor:
    """(K, C, C), random, in float64."""
    return torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64)).Q.contiguous()


def with_condition(condition: float) -> Callable[[int, int], Tensor]:
    """Matrices whose singular values fall from 1 to 1 / condition."""

    def make(count: int, n: int) -> Tensor:
        values = torch.logspace(0.0, -math.log10(condition), n, dtype=torch.float64)
        return (rotations(count, n) * values) @ rotations(count, n)

    return make


def permuted(count: int, n: int) -> Tensor:
    """Scaled permutations: one element in each row and column, all others zero."""
    orders = torch.stack([torch.randperm(n) for _ in range(count)])
    signs = 1.0 - 2.0 * (torch.arange(n) % 2)
    return torch.eye(n, dtype=torch.float64)[orders] * torch.linspace(0.5, 3.0, n, dtype=torch.float64) * signs


def needing_pivots(count: int, n: int) -> Tensor:
    """A diagonal of 1e-12 beside ones: a pivot that is not looked for loses twelve digits."""
    identity = torch.eye(n, dtype=torch.float64)
    return 1e-3 * rotations(count, n).tril(-1) + identity.roll(1, -1) + 1e-12 * identity


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "rotations": rotations,
    "condition 1e2": with_condition(1e2),
    "condition 1e8": with_condition(1e8),
    "permuted": permuted,
    "needing pivots": needing_pivots,
}


def exact(matrices: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of each of (K, C, C), by a Newton step in extended precision from that in float64, and log|det|.

    In numpy's longdouble, of 64 bits on x86, which where it is no more than double makes the bound no tighter.
    """
    double = matrices.double().cpu()
    given, start = (value.numpy().astype(np.longdouble) for value in (double, torch.linalg.inv(double)))
    return start @ (2 * np.eye(matrices.shape[-1]) - given @ start), torch.linalg.slogdet(double).logabsdet.numpy()


def assert_inverses(matrices: Tensor, inverses: Tensor, log_dets: Tensor) -> None:
    """Formed in float64, whose roundings the condition amplifies, and rounded once to the dtype of the matrices.

    Raises:
        AssertionError: another dtype or shape, or a larger error.
    """
    assert inverses.dtype == log_dets.dtype == matrices.dtype
    assert (inverses.shape, log_dets.shape) == (matrices.shape, matrices.shape[:1])
    n, once = matrices.shape[-1], torch.finfo(matrices.dtype).eps / 2
    for matrix, inverse, log_det, truth, true_log_det in zip(
        matrices, inverses, log_dets, *exact(matrices), strict=True
    ):
        size = float(np.abs(truth).max(initial=0.0))
        condition = float(torch.linalg.cond(matrix.double().cpu())) if n else 1.0
        formed = tolerance(n, condition)
        assert formed < 1e-2, f"a bound of {formed:.1e} decides nothing"
        error = np.abs(inverse.double().cpu().numpy() - truth) - once * np.abs(truth)
        assert error.max(initial=0.0) <= formed * size, f"inverse: {error.max():.2e}, bound {formed * size:.2e}"
        error = abs(float(log_det) - true_log_det) - once * abs(true_log_det)
        assert error <= formed * max(1.0, n), f"log|det|: {error:.2e}, bound {formed * max(1.0, n):.2e}"
