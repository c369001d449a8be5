"""Mean, standard deviation and standard error of numbers: each formula in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """The mean m = sum v / n of n numbers v, NaN where there are none, and the ``squares`` S = sum (v - m)^2."""

    n: int
    mean: float
    squares: float

    @classmethod
    def of(cls, values: Tensor, total: Callable[..., list[float]] = lambda *sums: list(sums)) -> Moments:
        """The moments of values v (n,), and of those of other processes.

        ``total`` sums each of its arguments over all processes that have values.
        """
        values = values.detach().double()
        summed, count = total(float(values.sum()), len(values))
        mean = summed / count if count else math.nan
        return cls(int(count), mean, *total(float((values - mean).square().sum())))

    @property
    def deviation(self) -> float:
        """The standard deviation sqrt(S / (n - 1)); NaN for fewer than two values."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else math.nan

    @property
    def standard_error(self) -> float:
        """The standard error of the mean, sqrt(S / (n - 1) / n); NaN for fewer than two values."""
        return math.sqrt(self.squares / (self.n - 1) / self.n) if self.n > 1 else math.nan
