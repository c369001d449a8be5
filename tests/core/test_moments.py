"""Mean, standard deviation and standard error against their definitions in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from pyglow_fast._core.moments import Moments

VALUES = [[1.0, 2.0, 4.5], [0.1, 0.1, 0.1], [3.0, -7.25], [1e3 + i / 8 for i in range(50)]]


def defined(values: list[float]) -> tuple[Fraction, Fraction]:
    """The mean and the unbiased variance."""
    exact = [Fraction(value) for value in values]
    mean = sum(exact, Fraction(0)) / len(exact)
    return mean, sum(((value - mean) ** 2 for value in exact), Fraction(0)) / (len(exact) - 1)


@pytest.mark.parametrize("values", VALUES, ids=lambda values: f"{len(values)} from {values[0]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_defined(values: list[float], dtype: torch.dtype) -> None:
    """A sum of n float64 of size v has an error below n v eps, and a deviation from the mean one below 2 n v eps."""
    given = torch.tensor(values, dtype=dtype)
    mean, variance = defined(given.tolist())
    found, n = Moments.of(given), len(values)
    bound = 2 * n * max(map(abs, values)) * torch.finfo(torch.float64).eps
    assert found.n == n
    assert found.mean == pytest.approx(float(mean), rel=0, abs=bound)
    assert found.deviation == pytest.approx(math.sqrt(variance), rel=1e-12, abs=2 * bound)
    assert found.standard_error == pytest.approx(math.sqrt(variance / n), rel=1e-12, abs=2 * bound)


def test_several_processes_are_one() -> None:
    """Two halves, each told the sums of both: first the values and counts, then the squares about the common mean."""
    values = torch.tensor([1.0, 2.0, 4.5, -3.0, 8.0], dtype=torch.float64)
    whole, parts = Moments.of(values), (values[:2], values[2:])
    of_both = [[12.5, 5.0], [float((values - 2.5).square().sum())]]
    for part in parts:
        told: list[tuple[float, ...]] = []

        def total(*sums: float, told: list[tuple[float, ...]] = told) -> list[float]:
            told.append(sums)
            return of_both[len(told) - 1]

        assert Moments.of(part, total) == whole
        assert told == [(float(part.sum()), len(part)), (float((part - 2.5).square().sum()),)]


def test_too_few_and_not_finite() -> None:
    none, one = Moments.of(torch.zeros(0)), Moments.of(torch.tensor([3.0]))
    assert (none.n, one.n, one.mean) == (0, 1, 3.0)
    assert all(map(math.isnan, (none.mean, none.deviation, none.standard_error, one.deviation, one.standard_error)))
    bad = Moments.of(torch.tensor([1.0, math.inf]))
    assert bad.mean == math.inf
    assert math.isnan(bad.deviation)
