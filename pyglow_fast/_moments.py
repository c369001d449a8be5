"""Mean, standard deviation and standard error of numbers: each formula in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _own(*sums: float) -> list[float]:
    return list(sums)


@dataclass(frozen=True)
class Moments:
    """The mean m = sum v / n of n numbers v, and S = sum (v - m)^2.

    Args:
        n: how many.
        mean: m; NaN where there are none.
        squares: S.
    """

    n: int
    mean: float
    squares: float

    @classmethod
    def of(cls, values: Tensor, total: Callable[..., list[float]] = _own) -> Moments:
        """The moments of all values, those of other processes among them.

        Args:
            values: v (n,), those of this process.
            total: sums each of its arguments over all processes that have values.
        """
        values = values.detach().double()
        summed, count = total(float(values.sum()), len(values))
        mean = summed / count if count else math.nan
        return cls(int(count), mean, *total(float((values - mean).square().sum())))

    @classmethod
    def of_sums(cls, n: float, summed: float, squares: float) -> Moments:
        """The moments by n > 0, sum v and sum v^2, for values that are nowhere together.

        S = sum v^2 - n m^2 is a difference of two large numbers: the sums should be float64.
        """
        mean = summed / n
        deviations = max(0.0, squares - n * mean * mean) if math.isfinite(squares) else math.nan
        return cls(int(n), mean, deviations)

    @property
    def deviation(self) -> float:
        """The standard deviation sqrt(S / (n - 1)); NaN for fewer than two values."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, sqrt(S / (n - 1) / n); NaN for fewer than two values."""
        return math.sqrt(self.squares / (self.n - 1) / self.n) if self.n > 1 else math.nan
