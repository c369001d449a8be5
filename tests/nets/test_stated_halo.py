"""The halos that nets of ours state are those that their convolutions have."""

from __future__ import annotations

import pytest
from support.halos import halo_is_enough
from support.net_cases import DilatedNet, WideNet, coupling_net
from torch import nn

import pyglow_fast as pgf


@pytest.mark.parametrize(
    ("net", "shape", "cond_channels"),
    [
        (coupling_net(1), (2, 2, 9), 0),
        (coupling_net(2, actnorm=True), (1, 2, 7, 3), 0),
        (coupling_net(3, cond_channels=2), (1, 2, 6, 2, 2), 2),
        (pgf.CouplingNet(2, 4, 5, border=True), (2, 2, 9, 4), 0),
        (WideNet(2, 1), (1, 2, 12, 3), 1),
        (DilatedNet(), (1, 2, 16, 4), 0),
    ],
)
def test_it_is_enough_and_a_smaller_one_is_not(net: nn.Module, shape: tuple[int, ...], cond_channels: int) -> None:
    stated = net.halo
    assert halo_is_enough(net, shape, cond_channels)
    for smaller in range(stated):
        net.halo = smaller
        assert not halo_is_enough(net, shape, cond_channels)
