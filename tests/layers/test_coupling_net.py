"""CouplingNet: its formula, its start, its condition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.covering import pairs
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast as pgf

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def randomised(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.double().parameters():
            parameter.normal_(0.0, 0.3)
    return net


def written_out(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The formula of the docstring, from the tensors of the state alone."""
    conv, column = CONVOLUTIONS[x.dim() - 2], (-1, *[1] * (x.dim() - 2))
    hidden = x
    for i, padding in (("1", 1), ("2", 0)):
        hidden = conv(hidden, state[f"conv{i}.weight"], state.get(f"conv{i}.bias"), padding=padding)
        if f"norm{i}.bias" in state:
            scale = state[f"norm{i}.log_scale"].exp().reshape(column)
            hidden = (hidden + state[f"norm{i}.bias"].reshape(column)) * scale
        hidden = hidden.clamp(min=0.0)
    out = conv(hidden, state["conv3.weight"], state["conv3.bias"], padding=1)
    return out * (3.0 * state["log_gain"]).exp()


@pairs(
    pytest.mark.parametrize("actnorm", [False, True]),
    pytest.mark.parametrize("cond_channels", [0, 2]),
    pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 1, 3), (1, 1)], ids=str),
)
def test_formula(actnorm: bool, cond_channels: int, spatial: tuple[int, ...]) -> None:
    net = randomised(pgf.CouplingNet(2, 5, 4, actnorm, cond_channels, dims=len(spatial)))
    x = torch.randn(3, 2, *spatial, dtype=torch.float64)
    cond = torch.randn(3, cond_channels, *spatial, dtype=torch.float64) if cond_channels else None
    out = net(x, cond)
    assert out.shape == (3, 5, *spatial)
    expected = written_out(dict(net.state_dict()), x if cond is None else torch.cat([x, cond], dim=1))
    assert_close(out, expected, condition=10.0)


@pytest.mark.parametrize("actnorm", [False, True])
def test_starts_at_zero(actnorm: bool) -> None:
    net = pgf.CouplingNet(2, 4, 8, actnorm)
    out = net(torch.randn(2, 2, 3, 5))
    assert not out.any()
    assert not net.log_gain.any()


def test_hidden_convolutions_keep_the_variance() -> None:
    net = pgf.CouplingNet(64, 2, 512)
    # 1x1 of 512 inputs: sqrt(2 / 512) is about the paper's 0.05 (0.0625); the standard error is below one percent.
    assert net.conv2.weight.std().item() == pytest.approx((2.0 / 512) ** 0.5, rel=0.03)
    assert net.conv1.weight.std().item() == pytest.approx((2.0 / (9 * 64)) ** 0.5, rel=0.03)
    assert not net.conv1.bias.any()
    assert not net.conv2.bias.any()


class TestHiddenActNorms:
    def test_initialise_from_what_reaches_them(self) -> None:
        net = pgf.CouplingNet(2, 4, 6, actnorm=True, cond_channels=1).double()
        x, cond = (torch.randn(8, channels, 4, 5, dtype=torch.float64) * 3.0 for channels in (2, 1))
        assert not net.is_initialized
        net.initialize(x, cond)
        assert net.is_initialized
        hidden = torch.cat([x, cond], dim=1)
        for conv, norm in ((net.conv1, net.norm1), (net.conv2, net.norm2)):
            hidden = conv(hidden)
            std = hidden.std((0, 2, 3), correction=0)
            hidden = norm(hidden)[0]
            assert_close(hidden.mean((0, 2, 3)), torch.zeros(6).double(), condition=10.0)
            assert_close(hidden.square().mean((0, 2, 3)).sqrt(), std / (std + norm.eps), condition=10.0)
            hidden = hidden.relu()

    def test_the_net_alone_never_initialises(self) -> None:
        # It runs in the inverse pass too, where it sees samples and not data.
        net = pgf.CouplingNet(2, 4, 6, actnorm=True)
        net.train()(torch.randn(4, 2, 3, 3))
        assert not net.is_initialized
        assert not net.norm1.initialized

    def test_none_is_initialised(self) -> None:
        assert pgf.CouplingNet(2, 4, 6).is_initialized

    def test_replace_the_biases(self) -> None:
        net = pgf.CouplingNet(2, 4, 6, actnorm=True)
        assert net.conv1.bias is None
        assert net.conv2.bias is None
        assert net.conv3.bias is not None
