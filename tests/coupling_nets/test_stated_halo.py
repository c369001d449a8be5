"""check_halo finds halos that are too small."""

from __future__ import annotations

import pytest
import torch
from support.net_cases import CircularNet, DilatedNet, DropoutNet, WideNet, coupling_net
from torch import nn

import pyglow_fast as pgf
from pyglow_fast.coupling_nets import check_halo, plan_chunks


@pytest.mark.parametrize(
    ("net", "shape", "cond_channels"),
    [
        (coupling_net(1), (2, 2, 9), 0),
        (coupling_net(2, actnorm=True), (1, 2, 7, 3), 0),
        (coupling_net(3, cond_channels=2), (1, 2, 6, 2, 2), 2),
        (WideNet(2, 1), (1, 2, 12, 3), 1),
        (DilatedNet(), (1, 2, 16, 4), 0),
        (DropoutNet(), (1, 2, 6, 4), 0),
    ],
)
def test_right_ones_pass_and_smaller_ones_do_not(net: nn.Module, shape: tuple[int, ...], cond_channels: int) -> None:
    stated = net.halo
    check_halo(net, shape, cond_channels)
    net.halo = stated + 1
    check_halo(net, (*shape[:2], shape[2] + 2, *shape[3:]), cond_channels)  # too large only costs time
    for smaller in range(stated):
        net.halo = smaller
        message = f"net.halo: expected all that an output position depends on, found {smaller}: an error of"
        with pytest.raises(ValueError, match=message):
            check_halo(net, shape, cond_channels)


def test_a_fresh_net_whose_output_is_zero() -> None:
    net = pgf.CouplingNet(2, 4, 8)
    check_halo(net, (1, 2, 8, 4))
    net.halo = 1
    with pytest.raises(ValueError, match=r"net.halo: expected all"):
        check_halo(net, (1, 2, 8, 4))


def test_padding_that_wraps_around_is_never_cut() -> None:
    net = CircularNet()
    assert net.halo is not None
    check_halo(net, (1, 2, 8, 4))
    assert plan_chunks(net, (2, 2, 64, 4), 4, 1).work == 1.0


def test_changes_nothing() -> None:
    net = DropoutNet().train()
    before = [parameter.clone() for parameter in net.parameters()]
    state = torch.get_rng_state()
    check_halo(net, (1, 2, 6, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert net.dropout.training
    for parameter, value in zip(net.parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, value)


class TestRefusals:
    def test_no_halo(self) -> None:
        with pytest.raises(ValueError, match=r"net\.halo: expected an int, found None"):
            check_halo(DilatedNet(halo=None), (1, 2, 16, 4))

    @pytest.mark.parametrize("shape", [(1, 2), (1, 2, 5, 4), (0, 2, 8, 4), (1, 2, 8, 0)], ids=str)
    def test_shapes_that_show_nothing(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"shape: expected \(N, C, \*spatial\) with at least 6 rows"):
            check_halo(pgf.CouplingNet(2, 4, 8), shape)

    def test_a_net_that_gives_nothing(self) -> None:
        class Zero(nn.Module):
            halo = 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 0.0 * x

        with pytest.raises(ValueError, match="net: expected an output that depends on its parameters"):
            check_halo(Zero(), (1, 2, 8, 4))

    def test_a_net_that_cannot_be_cut_at_all(self) -> None:
        with pytest.raises(ValueError, match="no BatchNorm that uses the statistics of the batch"):
            check_halo(nn.BatchNorm2d(2), (1, 2, 8, 4))
