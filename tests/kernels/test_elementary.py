"""The error bounds that csrc/math/elementary.h states for its vector functions, in units in the last place, and those
of the activations in csrc/math/activation.h, which follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyglow_fast._core import backend
from pyglow_fast.reference import ACTIVATIONS, Activation, activated

pytestmark = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")

NAMES = ("exp", "log", "log1p_unit", "tanh", "atan", "expm1_negative", "erf", "erfc")


def _ulps(actual: Tensor, exact: Tensor) -> Tensor:
    """|actual - exact| in units in the last place of the result's dtype; exact is float64."""
    magnitude = exact.to(actual.dtype).abs()
    ulp = torch.nextafter(magnitude, torch.full_like(magnitude, math.inf)) - magnitude
    return (actual.double() - exact).abs() / ulp.double()


FLOAT32 = [
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
    ("expm1_negative", -100.0, 0.0, 2.0),
    ("expm1_negative", -1.5, 0.0, 2.0),
    ("expm1_negative", -1e-3, 0.0, 2.0),
    ("erf", -5.0, 5.0, 3.0),
    ("erf", -1e-3, 1e-3, 3.0),
    ("erfc", -5.0, 1.0, 7.0),
]
# Against the platform's library, itself within 1 ulp.
FLOAT64 = [("exp", -700.0, 700.0), ("log1p_unit", 0.0, 1.0), ("expm1_negative", -50.0, 0.0), ("erf", -6.0, 6.0)]


@pytest.mark.parametrize(
    ("name", "low", "high", "bound", "dtype"),
    [*((*row, torch.float32) for row in FLOAT32), *((*row, 3.0, torch.float64) for row in FLOAT64)],
)
def test_bounds(name: str, low: float, high: float, bound: float, dtype: torch.dtype) -> None:
    x = torch.linspace(low, high, 200_003, dtype=torch.float64).to(dtype)
    of_torch = getattr(torch, name.partition("_")[0])
    error = _ulps(backend.require().elementary(name, x), of_torch(x.double()))
    assert float(error.max()) <= bound


def test_tail_of_erfc() -> None:
    """To where it is subnormal. The rounding of x^2, half an ulp of it, is x^2 units of a mantissa near 2."""
    x = torch.linspace(1.0, 9.0, 200_003, dtype=torch.float64).float()
    error = _ulps(backend.require().elementary("erfc", x), torch.erfc(x.double()))
    assert float((error - x.double().square()).max()) <= 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    """NaN stays NaN, infinities go where they should; every lane position and count is covered."""
    elementary = backend.require().elementary
    for count in range(1, 35):
        for at in range(count):
            x = torch.full((count,), 0.5, dtype=dtype)
            x[at] = math.nan
            for name in NAMES:
                result = elementary(name, x)
                assert result.isnan().nonzero().flatten().tolist() == [at]
    x = torch.tensor([math.inf, -math.inf, 1000.0, -1000.0], dtype=dtype)
    assert elementary("exp", x).tolist() == [math.inf, 0.0, math.inf, 0.0]
    assert elementary("tanh", x).tolist() == [1.0, -1.0, 1.0, -1.0]
    assert elementary("erf", x).tolist() == [1.0, -1.0, 1.0, -1.0]
    assert elementary("erfc", x).tolist() == [0.0, 2.0, 0.0, 2.0]
    assert elementary("expm1_negative", x[1::2].clone()).tolist() == [-1.0, -1.0]
    assert elementary("log", torch.tensor([0.0, 1.0], dtype=dtype)).tolist() == [-math.inf, 0.0]
    assert elementary("log", torch.tensor([-1.0], dtype=dtype)).isnan().all()


# Activations. Their exact values are float64 formulas that keep relative accuracy, where torch's own may cancel.
KEEPS_INPUT = {"silu", "gelu", "gelu_tanh"}
PARAMETERS = {"leaky_relu": 0.2, "elu": 1.3}


def _sigmoid(x: Tensor) -> Tensor:
    """To where it underflows; torch's exp(-x) overflows before."""
    e = torch.exp(torch.where(x < 0, x, -x))
    return torch.where(x < 0, e / (1 + e), 1 / (1 + e))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-math.sqrt(0.5) * x)


def _twice_u(x: Tensor) -> Tensor:
    """2 u where gelu_tanh is x (1 + tanh(u)) / 2."""
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)


EXACT: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, _: x * _sigmoid(x),
    "gelu": lambda x, _: x * _normal_cdf(x),
    "gelu_tanh": lambda x, _: x * _sigmoid(_twice_u(x)),
    "elu": lambda x, alpha: torch.where(x > 0, x, alpha * torch.expm1(torch.where(x > 0, 0.0, x))),
    "sigmoid": lambda x, _: _sigmoid(x),
}


# Bounds of the errors in units of the dtype's epsilon, from x, the exact y and the exact derivative d >= 0. An
# operation errs by half an epsilon of its result, exp by 1.5, so the sigmoid and its complement by 3 and erfc by 5; an
# error of an exponent is a relative one of the power. In a sum of two terms each has its own error, also where they
# cancel. A derivative from y has the error of y besides, times what y counts in it.


def _silu_bounds(x: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid and product; the sum of sigmoid and x sigmoid complement, 3 + 3 and four operations."""
    s, c = _sigmoid(x), _sigmoid(-x)
    return 3.5 * y.abs(), 8.0 * (s + x.abs() * s * c)


def _gelu_bounds(x: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """erfc and product; the density 1.5 and two products, the sum and grad.

    The exponent z^2 = x^2 / 2 has the rounding of sqrt(1/2) and that of z twice, and its own: 2.5 epsilon of it.
    Above zero only what is missing to 1 feels it.
    """
    density = x.abs() * torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    exponent, tail = 1.25 * x**2, _normal_cdf(-x.abs())
    return 5.5 * y.abs() + exponent * x.abs() * tail, 6.5 * (_normal_cdf(x) + density) + exponent * (tail + density)


def _gelu_tanh_bounds(x: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid and product; the second term sigmoid, complement, two constants, six products and a sum.

    The exponent 2 u: two constants, four products and a sum, 3.5 epsilon of it.
    """
    z = _twice_u(x)
    s, c = _sigmoid(z), _sigmoid(-z)
    term = s * c * math.sqrt(8 / math.pi) * (x + 3 * 0.044715 * x**3).abs()
    return (3.5 + 3.5 * z.abs() * c) * y.abs(), 11.5 * (s + term) + 3.5 * z.abs() * (s * c + term)


BOUNDS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda x, y, d: (0 * y, 0 * d),
    "relu": lambda x, y, d: (0 * y, 0 * d),
    "leaky_relu": lambda x, y, d: (0.5 * y.abs(), 0.5 * d),
    "silu": _silu_bounds,
    "gelu": _gelu_bounds,
    "gelu_tanh": _gelu_tanh_bounds,
    # expm1 2 and product; y + alpha and grad
    "elu": lambda x, y, d: (torch.where(x > 0, 0, 2.5 * y.abs()), torch.where(x > 0, 0, d + 2.5 * y.abs())),
    # tanh 2; (1 - y) (1 + y) and grad, where y counts 2 y
    "tanh": lambda x, y, d: (2.0 * y.abs(), 2.0 * d + 4.0 * y**2),
    # y (1 - y) and grad, where y counts |1 - 2 y| <= 1
    "sigmoid": lambda x, y, d: (3.0 * y, 1.5 * d + 3.0 * y),
}


def _exact(name: str, x: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Value and derivative in float64."""
    x = x.detach().double().requires_grad_()
    y = EXACT[name](x, parameter) if name in EXACT else activated(x, Activation(name, parameter))
    (derivative,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), derivative.detach()


def _sweep(dtype: torch.dtype) -> Tensor:
    """Dense where the activations bend, then numbers of every size: subnormal ones to 1e30."""
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    last = int(torch.tensor(1e30, dtype=dtype).view(integer))
    sizes = torch.arange(0, last, last // 50_000, dtype=integer).view(dtype)
    dense = [torch.linspace(-reach, reach, 100_003, dtype=dtype) for reach in (1.0, 12.0, 110.0)]
    return torch.cat([*dense, sizes, -sizes])


def _errors(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of values and derivatives, as parts of their bounds.

    Beside the bound of its size a result may be off by what gradual underflow takes, two of the smallest numbers, times
    the largest factor that comes after: x, or 6 u of gelu_tanh's derivative, which is zero from 32 on. In float64 the
    exact result has as large an error.
    """
    dtype, activation = x.dtype, backend.require().activation
    parameter = float(torch.tensor(PARAMETERS.get(name, 0.0), dtype=dtype))
    wide = x.double()
    y, derivative = _exact(name, wide, parameter)
    value_bound, derivative_bound = BOUNDS[name](wide, y, derivative)
    finfo, times = torch.finfo(dtype), 1 if dtype == torch.float32 else 2
    smallest = 2 * finfo.smallest_normal * finfo.eps

    value = activation(name, x, parameter)
    value_bound = value_bound * finfo.eps * times + smallest * (1 + wide.abs())
    value_error = (value.double() - y).abs() / value_bound

    grad = torch.linspace(0.25, 4.0, x.numel(), dtype=dtype)
    found = activation(name, x if name in KEEPS_INPUT else value, parameter, grad).double() / grad.double()
    factor = 1 + wide.abs() + 3 * _twice_u(wide.clamp(-32.0, 32.0)).abs()
    derivative_bound = derivative_bound * finfo.eps * times + smallest * factor
    return value_error, (found - derivative).abs() / derivative_bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, dtype: torch.dtype) -> None:
    for error in _errors(name, _sweep(dtype)):
        assert error.isfinite().all()
        assert float(error.max()) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_values_of_activations(name: str, dtype: torch.dtype) -> None:
    """As torch's, but for gelu of inf, which torch's vectors make NaN; large numbers do not overflow on the way."""
    activation, largest = backend.require().activation, torch.finfo(dtype).max
    parameter = PARAMETERS.get(name, 0.0)
    x = torch.tensor([math.nan, -math.inf, math.inf, 0.0], dtype=dtype)
    expected = activated(x, Activation(name, parameter))
    expected[2] = 1.0 if name in ("tanh", "sigmoid") else math.inf
    assert expected[1].isnan() == (name in KEEPS_INPUT)
    torch.testing.assert_close(activation(name, x, parameter), expected, rtol=0.0, atol=0.0, equal_nan=True)
    for value in (largest, 1e20, 1000.0):
        x = torch.tensor([value, -value], dtype=dtype)
        y = activation(name, x, parameter)
        lower = {"none": -value, "leaky_relu": -value * parameter, "elu": -parameter, "tanh": -1.0}.get(name, 0.0)
        upper = 1.0 if name in ("tanh", "sigmoid") else value
        torch.testing.assert_close(y, torch.tensor([upper, lower], dtype=dtype))
        grad = activation(name, x if name in KEEPS_INPUT else y, parameter, torch.full_like(x, 3.0))
        slopes = {"none": [1.0, 1.0], "leaky_relu": [1.0, parameter], "tanh": [0.0, 0.0], "sigmoid": [0.0, 0.0]}
        expected_grad = 3 * torch.tensor(slopes.get(name, [1.0, 0.0]), dtype=dtype)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)
