"""The error bounds that csrc/math/elementary.h states for its vector functions, in units in the last place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyglow_fast import _backend

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")

TORCH = {"exp": torch.exp, "log": torch.log, "log1p_unit": torch.log1p, "tanh": torch.tanh, "atan": torch.atan}


def _ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in units in the last place of the result's dtype; exact is float64."""
    magnitude = exact.to(actual.dtype).abs()
    ulp = torch.nextafter(magnitude, torch.full_like(magnitude, math.inf)) - magnitude
    return (actual.double() - exact).abs() / ulp.double()


@pytest.mark.parametrize(
    ("name", "low", "high", "bound"),
    [
        ("exp", -87.0, 88.0, 1.5),
        ("exp", -103.0, -87.0, 1.0),  # gradual underflow
        ("log1p_unit", 0.0, 1.0, 2.5),
        ("log1p_unit", 0.0, 1e-4, 2.5),
        ("log", 1e-30, 1e-3, 2.5),
        ("log", 1e-3, 10.0, 2.5),
        ("log", 0.99, 1.01, 2.5),
        ("tanh", -9.0, 9.0, 2.0),
        ("tanh", -1e-3, 1e-3, 2.0),
        ("atan", -20.0, 20.0, 3.0),
        ("atan", -1e-3, 1e-3, 3.0),
    ],
)
def test_float_bounds(name: str, low: float, high: float, bound: float) -> None:
    x = torch.linspace(low, high, 200_003, dtype=torch.float64).float()
    error = _ulps(_backend.require().elementary(name, x), TORCH[name](x.double()))
    assert float(error.max()) <= bound


@pytest.mark.parametrize(("name", "low", "high"), [("exp", -700.0, 700.0), ("log1p_unit", 0.0, 1.0)])
def test_double_bounds(name: str, low: float, high: float) -> None:
    """Against the platform's library, itself within 1 ulp."""
    x = torch.linspace(low, high, 200_003, dtype=torch.float64)
    assert float(_ulps(_backend.require().elementary(name, x), TORCH[name](x)).max()) <= 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    """NaN stays NaN, infinities go where they should; every lane position and count is covered."""
    elementary = _backend.require().elementary
    for count in range(1, 35):
        for at in range(count):
            x = torch.full((count,), 0.5, dtype=dtype)
            x[at] = math.nan
            for name in TORCH:
                result = elementary(name, x)
                assert result.isnan().nonzero().flatten().tolist() == [at]
    x = torch.tensor([math.inf, -math.inf, 1000.0, -1000.0], dtype=dtype)
    assert elementary("exp", x).tolist() == [math.inf, 0.0, math.inf, 0.0]
    assert elementary("tanh", x).tolist() == [1.0, -1.0, 1.0, -1.0]
    assert elementary("log", torch.tensor([0.0, 1.0], dtype=dtype)).tolist() == [-math.inf, 0.0]
    assert elementary("log", torch.tensor([-1.0], dtype=dtype)).isnan().all()


def test_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="name: expected exp, log, log1p_unit, tanh or atan, found sin"):
        _backend.require().elementary("sin", torch.zeros(1))
