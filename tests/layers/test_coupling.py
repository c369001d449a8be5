"""Coupling: its formula with any net, its start, its hidden ActNorms, its refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.bijections import softplus_scale
from support.covering import pairs
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import reference
from pyglow_fast.reference import ORDERS, SCALE_MAPS, CouplingSpec


class Given(nn.Module):
    """A net that returns what it is told to, and remembers what it was given."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out, self.seen = out, []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.seen.append(inputs)
        return self.out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scale_map", [*SCALE_MAPS, pytest.param(softplus_scale, id="callable")])
def test_affine(scale_map: str, order: str) -> None:
    x, out = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    layer = pgf.Coupling(Given(out), "affine", scale_map, 1.5, 0.25, 0.75, order)
    z, log_det = layer(x)
    shift, raw = out[:, :2], out[:, 2:]
    scale, log_scale = reference.scale_and_log(raw, CouplingSpec("affine", scale_map, 1.5, 0.25, 0.75))
    expected = (x[:, 2:] + shift) * scale if order == "shift_scale" else x[:, 2:] * scale + shift
    assert_close(z, torch.cat([x[:, :2], expected], dim=1))
    assert_close(log_det, log_scale.sum((1, 2)), condition=6.0)
    assert_close(layer.inverse(z)[0], x, condition=10.0)


def test_additive() -> None:
    x, out = torch.randn(2, 4, 3), torch.randn(2, 2, 3)
    layer = pgf.Coupling(Given(out), "additive")
    z, log_det = layer(x)
    assert torch.equal(z, torch.cat([x[:, :2], x[:, 2:] + out], dim=1))
    assert torch.equal(log_det, torch.zeros(2))


def test_the_net_sees_the_kept_half_and_the_condition() -> None:
    x, cond, net = torch.randn(2, 4, 3), torch.randn(2, 5), Given(torch.zeros(2, 4, 3))
    layer = pgf.Coupling(net)
    layer(x)
    z, _ = layer(x, cond)
    layer.inverse(z, cond)
    assert [len(inputs) for inputs in net.seen] == [1, 2, 2]
    for inputs in net.seen:
        assert torch.equal(inputs[0], x[:, :2])
    assert all(torch.equal(inputs[1], cond) for inputs in net.seen[1:])


@pairs(
    pytest.mark.parametrize("actnorm", [False, True]),
    pytest.mark.parametrize("coupling", ["affine", "additive"]),
    pytest.mark.parametrize(
        ("scale_map", "at_zero"), [("sigmoid", torch.tensor(2.0).sigmoid()), ("exp", 1.0), ("tanh", 1.0), ("atan", 1.0)]
    ),
)
def test_fresh_is_the_identity_up_to_its_constant_scale(
    coupling: str, scale_map: str, at_zero: float, actnorm: bool
) -> None:
    net = pgf.CouplingNet(2, 4 if coupling == "affine" else 2, 8, actnorm=actnorm)
    x = torch.randn(3, 4, 2, 5)
    layer = pgf.Coupling(net, coupling, scale_map)
    z, log_det = layer(x)
    scale = torch.as_tensor(1.0 if coupling == "additive" else at_zero)
    assert torch.equal(z[:, :2], x[:, :2])
    assert_close(z[:, 2:], x[:, 2:] * scale)
    assert_close(log_det, (20.0 * scale.log()).expand(3), condition=20.0)


class TestHiddenActNorms:
    @staticmethod
    def build() -> pgf.Coupling:
        return pgf.Coupling(pgf.CouplingNet(2, 4, 6, actnorm=True, cond_channels=1))

    def test_the_forward_initialises_them_from_the_kept_half(self) -> None:
        layer, twin = self.build(), self.build()
        twin.load_state_dict(layer.state_dict())
        x, cond = torch.randn(4, 4, 3, 3) * 2.0, torch.randn(4, 1, 3, 3)
        layer(x, cond)
        twin.net.initialize(x[:, :2], cond)
        assert layer.net.is_initialized
        for got, expected in zip(layer.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(got, expected)

    def test_only_the_first_forward_does(self) -> None:
        layer = self.build()
        x, cond = torch.randn(4, 4, 3, 3), torch.randn(4, 1, 3, 3)
        layer(x, cond)
        before = copy.deepcopy(layer.state_dict())
        layer(5.0 * x + 1.0, cond)
        layer.initialize(5.0 * x + 1.0, cond)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "linear"}, r"coupling: expected one of \('affine', 'additive'\), found 'linear'"),
        ({"scale_map": "relu"}, "scale_map: expected one of .* or a callable, found 'relu'"),
        ({"order": "scale"}, r"order: expected one of \('shift_scale', 'scale_shift'\), found 'scale'"),
        ({"scale_eps": -0.1}, "scale_eps: expected a number, 0 or more, found -0.1"),
        ({"scale_clamp": 0.0}, "scale_clamp: expected a positive number, at most 80, found 0.0"),
        ({"scale_factor": 0.0}, r"scale_factor: expected a number from 1e-30 to 1e\+30, found 0.0"),
        ({"scale_factor": math.nan}, r"scale_factor: expected a number from 1e-30 to 1e\+30, found nan"),
        ({"scale_factor": math.inf}, r"scale_factor: expected a number from 1e-30 to 1e\+30, found inf"),
        ({"scale_factor": 2.0, "scale_map": "tanh"}, "scale_factor: expected 1 where the scale is no sigmoid, found 2"),
        ({"scale_factor": 2.0, "scale_map": lambda raw: (raw, raw)}, "scale_factor: expected 1 where .* found 2"),
        ({"scale_factor": 2.0, "coupling": "additive"}, "scale_factor: expected 1 where .* is no sigmoid, found 2"),
    ],
)
def test_wrong_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgf.Coupling(nn.Identity(), **options)


def test_repr_tells_the_map() -> None:
    text = repr(pgf.Coupling(pgf.CouplingNet(1, 2, 3), scale_map="exp"))
    assert "coupling='affine', scale_map='exp', order='shift_scale'" in text
