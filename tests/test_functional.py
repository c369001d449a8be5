"""The public functions against the reference, values and gradients, in float64.

How precise the kernels behind them are in float32 is the business of the tests of the ops.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_close, jacobian, log_abs_det
from support.reference_cases import SPECS, invertible, randn, spec_name
from torch import Tensor
from torch.autograd import forward_ad

from pyglow_fast import functional, reference
from pyglow_fast.reference import CouplingSpec

SHAPES = [(3, 4), (2, 4, 5), (2, 6, 3, 2), (1, 2, 1, 7), (2, 2, 3, 1, 2), (0, 4, 3, 2)]


def values_and_gradients(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs, then the gradients of a random (but always the same) combination of them."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device) for value in outputs]
    # An additive coupling's log_det is a constant.
    loss = sum((value * weight).sum() for value, weight in zip(outputs, weights, strict=True) if value.requires_grad)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_same(name: str, inputs: tuple[Tensor, ...], *constants: object, condition: float = 1.0) -> None:
    def run(function: Callable[..., object]) -> list[Tensor]:
        return values_and_gradients(lambda *values: function(*values, *constants), inputs)

    got, expected = run(getattr(functional, name)), run(getattr(reference, name))
    for value, target in zip(got, expected, strict=True):
        assert_close(value, target, condition * max(1.0, inputs[0].numel()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["channel_mix", "channel_unmix"])
def test_channel_mix(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    inputs = (randn(*shape).to(device), invertible(shape[1]).to(device), randn(shape[1]).to(device))
    assert_same(name, inputs)


@pairs(
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("spec", SPECS, ids=spec_name),
    pytest.mark.parametrize("name", ["coupling", "coupling_inverse"]),
)
def test_coupling(name: str, spec: CouplingSpec, shape: tuple[int, ...], device: torch.device) -> None:
    width = shape[1] if spec.coupling == "affine" else shape[1] // 2
    inputs = (randn(*shape).to(device), randn(shape[0], width, *shape[2:]).to(device))
    assert_same(name, inputs, spec, condition=50.0)  # of the inverse: exp(-raw), |raw| up to 4


@pytest.mark.parametrize("raw", [-30.0, -100.0, 30.0, 100.0])
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.coupling == "affine"], ids=spec_name)
def test_extreme_raw_scales(spec: CouplingSpec, raw: float, device: torch.device) -> None:
    u, net_out = randn(2, 4, 3).to(device), randn(2, 4, 3).to(device)
    net_out[:, 2:] = raw
    y, log_det = functional.coupling(u, net_out, spec)
    expected, expected_log_det = reference.coupling(u, net_out, spec)
    largest = max(1.0, float(expected.abs().max()))
    assert_close(y / largest, expected / largest)
    assert_close(log_det, expected_log_det, condition=6.0)
    again, inverse_log_det = functional.coupling_inverse(y, net_out, spec)
    assert_close(inverse_log_det, -log_det)
    if spec.order == "shift_scale":  # else y = u s + shift keeps of a small u s only what the shift leaves room for
        assert_close(again, u)


@pairs(
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("spec", SPECS, ids=spec_name),
    pytest.mark.parametrize("name", ["coupling_mix", "coupling_mix_inverse"]),
)
def test_coupling_mix(name: str, spec: CouplingSpec, shape: tuple[int, ...], device: torch.device) -> None:
    width = shape[1] if spec.coupling == "affine" else shape[1] // 2
    inputs = (randn(*shape), randn(shape[0], width, *shape[2:]), invertible(shape[1]), randn(shape[1]))
    inputs = tuple(value.to(device) for value in inputs)
    assert_same(name, inputs, spec, condition=200.0)  # the coupling's, and that of the matrix
    with torch.no_grad():
        for got, expected in zip(
            getattr(functional, name)(*inputs, spec), getattr(reference, name)(*inputs, spec), strict=True
        ):
            assert_close(got, expected, condition=200.0 * max(1, inputs[0].numel()))


@pytest.mark.parametrize("field", ["coupling", "order", "scale_map"])
@pytest.mark.parametrize("name", ["coupling", "coupling_inverse"])
def test_an_unknown_option_is_refused(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: expected one of .* found 'other'"):
        getattr(functional, name)(randn(2, 4), randn(2, 4), CouplingSpec(**{field: "other"}))


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_coupling_net(leak: float, shape: tuple[int, ...], device: torch.device) -> None:
    three, one = [3] * (len(shape) - 2), [1] * (len(shape) - 2)
    sizes = [(6, shape[1], *three), (6,), (6, 6, *one), (6,), (4, 6, *three), (4,), (4, *one)]
    inputs = (randn(*shape), *(0.3 * randn(*size) for size in sizes))
    inputs = tuple(value.to(device) for value in inputs)
    got, expected = (
        values_and_gradients(functools.partial(module.coupling_net, leak=leak), inputs)
        for module in (functional, reference)
    )
    for value, target in zip(got, expected, strict=True):
        assert_close(value, target, inputs[0].numel())


STATE, MAP = (2, 4, 3, 2), [(4, 4), (4,)]
WEIGHTS = [(6, 4, 3, 3), (6,), (6, 6, 1, 1), (6,), (4, 6, 3, 3), (4,), (4, 1, 1)]  # of a net, and its gain
TENSORS: dict[str, list[tuple[int, ...]]] = {
    "channel_mix": [STATE, *MAP],
    "channel_unmix": [STATE, *MAP],
    "coupling": [STATE, STATE],
    "coupling_inverse": [STATE, STATE],
    "coupling_mix": [STATE, STATE, *MAP],
    "coupling_mix_inverse": [STATE, STATE, *MAP],
    "coupling_net": [STATE, *WEIGHTS],
    "gaussian_log_prob": [STATE] * 3,
    "gaussian_sample": [STATE] * 3,
}


@pytest.mark.parametrize("name", TENSORS)
def test_one_tensor_alone_wants_a_gradient(name: str, device: torch.device) -> None:
    """And gets the one that it gets where all want theirs."""
    inputs = [(0.3 * randn(*shape)).to(device) for shape in TENSORS[name]]
    specs = [CouplingSpec()] if name.startswith("coupling") and name != "coupling_net" else []

    def run(*values: Tensor) -> object:
        return getattr(functional, name)(*values, *specs)

    expected = values_and_gradients(run, tuple(inputs))[-len(inputs) :]
    for i, gradient in enumerate(expected):
        rest = inputs[i + 1 :]
        *_, alone = values_and_gradients(lambda value, i=i, rest=rest: run(*inputs[:i], value, *rest), (inputs[i],))
        assert_close(alone, gradient, condition=100.0)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_channel_moments(shape: tuple[int, ...], device: torch.device) -> None:
    x = (3.0 * randn(*shape) + 5.0).to(device)
    for got, expected in zip(functional.channel_moments(x), reference.channel_moments(x), strict=True):
        assert_close(got, expected, condition=x.numel())


@pairs(
    pytest.mark.parametrize("shape", SHAPES, ids=str),
    pytest.mark.parametrize("broadcast", [False, True]),
    pytest.mark.parametrize("name", ["gaussian_log_prob", "gaussian_sample"]),
)
def test_gaussian(name: str, broadcast: bool, shape: tuple[int, ...], device: torch.device) -> None:
    parameters = (1, shape[1], *[1] * (len(shape) - 2)) if broadcast else shape
    inputs = tuple(value.to(device) for value in (randn(*shape), randn(*parameters), randn(*parameters)))
    assert_same(name, inputs, condition=1000.0)  # exp(-2 log_sd), log_sd beyond -3 unlikely
    with torch.no_grad():
        expected = getattr(reference, name)(*inputs)
        assert_close(getattr(functional, name)(*inputs), expected, condition=1000.0 * max(1, inputs[0].numel()))


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_actnorm(shape: tuple[int, ...]) -> None:
    x, log_scale, bias = randn(*shape), 0.3 * randn(shape[1]), randn(shape[1])
    z, log_det = functional.actnorm(x, log_scale, bias)
    column = (-1, *[1] * (len(shape) - 2))
    assert_close(z, (x + bias.reshape(column)) * log_scale.reshape(column).exp())
    derivative = jacobian(lambda values: functional.actnorm(values, log_scale, bias)[0], x)
    assert_close(log_det, log_abs_det(derivative), condition=4.0 * x[0].numel())
    again, inverse_log_det = functional.actnorm_inverse(z, log_scale, bias)
    assert_close(again, x)
    assert torch.equal(inverse_log_det, -log_det)
    leaves = [value.requires_grad_() for value in (x, log_scale, bias)]
    assert torch.autograd.gradcheck(functional.actnorm, leaves)
    assert torch.autograd.gradcheck(functional.actnorm_inverse, leaves)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_channel_linear(shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape), invertible(shape[1])
    weight_log_det = torch.linalg.slogdet(weight).logabsdet
    z, log_det = functional.channel_linear(x, weight, weight_log_det)
    assert_close(z, torch.einsum("ij,nj...->ni...", weight, x))
    derivative = jacobian(lambda values: functional.channel_linear(values, weight, weight_log_det)[0], x)
    assert_close(log_det, log_abs_det(derivative), condition=4.0 * x[0].numel())
    again, inverse_log_det = functional.channel_linear_inverse(z, weight, weight_log_det)
    assert_close(again, x, condition=4.0)
    assert torch.equal(inverse_log_det, -log_det)
    leaves = [value.requires_grad_() for value in (x, weight)]

    def through_the_weight(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda values, matrix: function(values, matrix, torch.linalg.slogdet(matrix).logabsdet)

    assert torch.autograd.gradcheck(through_the_weight(functional.channel_linear), leaves)
    assert torch.autograd.gradcheck(through_the_weight(functional.channel_linear_inverse), leaves)


def test_names_and_arguments_are_those_of_the_reference() -> None:
    shared = [name for name in functional.__all__ if hasattr(reference, name)]
    assert {"channel_mix", "channel_unmix", "coupling", "coupling_inverse", "squeeze"} <= set(shared)
    for name in shared:
        ours, theirs = getattr(functional, name), getattr(reference, name)
        if inspect.isfunction(ours):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    assert functional.__all__ == sorted(functional.__all__)
    assert all(hasattr(functional, name) for name in functional.__all__)


_X, _OUT = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
_MATRIX, _OFFSET = torch.eye(4) + 0.1 * torch.arange(16.0).reshape(4, 4) / 16, torch.arange(4.0)
_NET = [torch.full(shape, 0.1) for shape in ((8, 4, 3, 3), (8,), (8, 8, 1, 1), (8,), (4, 8, 3, 3), (4,))]
FORWARD_MODE: dict[str, Callable[[ModuleType, Tensor], Tensor]] = {
    "channel_mix": lambda home, x: home.channel_mix(x, _MATRIX, _OFFSET),
    "channel_unmix": lambda home, x: home.channel_unmix(x, _MATRIX, _OFFSET),
    "coupling": lambda home, x: home.coupling(x, _OUT, CouplingSpec())[0],
    "coupling_inverse": lambda home, x: home.coupling_inverse(x, _OUT, CouplingSpec())[1],
    "coupling_mix": lambda home, x: home.coupling_mix(x, _OUT, _MATRIX, _OFFSET, CouplingSpec())[0],
    "coupling_mix_inverse": lambda home, x: home.coupling_mix_inverse(x, _OUT, _MATRIX, _OFFSET, CouplingSpec())[0],
    "coupling_net": lambda home, x: home.coupling_net(x, *_NET),
    "invert_matrix": lambda home, x: home.invert_matrix(3.0 * torch.eye(3) + x),
    "log_abs_det": lambda home, x: home.log_abs_det(3.0 * torch.eye(3) + x.flatten(0, 1)),
    "gaussian_log_prob": lambda home, x: home.gaussian_log_prob(x, _OUT, _OUT),
    "gaussian_sample": lambda home, x: home.gaussian_sample(x, _OUT, _OUT),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
@pytest.mark.parametrize("way", ["jvp", "dual", "vmap", "grad", "compiled grad"])
def test_transforms_are_those_of_plain_torch(name: str, way: str) -> None:
    """Kernels step aside: a tangent or gradient of zero, or the values of another sample, would be believed."""
    tangent = torch.randn_like(_X)
    ways: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor | None]] = {
        "jvp": lambda function: torch.func.jvp(function, (_X,), (tangent,))[1],
        "dual": lambda function: _dual_tangent(function, _X, tangent),
        "vmap": lambda function: torch.func.vmap(function)(torch.stack([_X, tangent])),
        "grad": lambda function: torch.func.grad(lambda x: function(x).square().sum())(_X),
        "compiled grad": lambda function: torch.compile(
            torch.func.grad(lambda x: function(x).square().sum()), backend="eager"
        )(_X),
    }
    torch._dynamo.reset()
    found, expected = (ways[way](functools.partial(FORWARD_MODE[name], home)) for home in (functional, reference))
    if expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, expected)


def _dual_tangent(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
