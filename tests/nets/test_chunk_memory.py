"""Activations stay within the budget, and what a net states is neither too low nor far too high."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.net_cases import plain_call
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import peak_tensor_bytes
from pyglow_fast.layers import WaveNet
from pyglow_fast.nets.plan import Chunk, plan_chunks
from pyglow_fast.nets.run import run_net, run_net_backward
from pyglow_fast.nets.traits import bytes_per_position

HIDDEN = 64


def net_for(actnorm: bool, cond_channels: int = 0) -> nn.Module:
    net = pgf.CouplingNet(6, 12, HIDDEN, actnorm, cond_channels)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    return net


def backward_peak(net: nn.Module, x: Tensor, cond: Tensor | None, plan: tuple[Chunk, ...]) -> int:
    def consume(out: Tensor, chunk: Chunk) -> Tensor:
        return 2.0 * out

    return peak_tensor_bytes(lambda: run_net_backward(plain_call(net), x, cond, plan, consume, list(net.parameters())))


def parameter_bytes(net: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.full
@pytest.mark.parametrize(
    ("net", "shape", "cond_channels", "autocast", "least"),
    [
        *(
            (net_for(actnorm, cond_channels), (2, 6, 64, 64), cond_channels, autocast, 0.0 if autocast else 0.4)
            for actnorm, cond_channels, autocast in product((False, True), (0, 40), (False, True))
        ),
        *((WaveNet(8, 16, 32, 5, 1, 4, dropout=dropout), (2, 8, 3000), 0, False, 0.6) for dropout in (0.0, 0.2)),
    ],
)
def test_what_a_net_states_is_enough_and_not_far_too_much(
    net: nn.Module, shape: tuple[int, ...], cond_channels: int, autocast: bool, least: float
) -> None:
    """CouplingNets run by products of ours, which keep about half of what autograd does."""
    x = torch.randn(shape)
    cond = torch.randn(shape[0], cond_channels, *shape[2:]) if cond_channels else None
    plan = plan_chunks(net, x.shape, 4, 10**12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        activations = backward_peak(net, x, cond, plan) - parameter_bytes(net)
    stated = x[:, 0].numel() * net.bytes_per_position(4)
    assert least * stated <= activations <= stated


def test_forward_stays_within_the_budget() -> None:
    net, x = net_for(True), torch.randn(2, 6, 64, 64)
    budget = 64 * 64 * net.bytes_per_position(4) // 4
    plan = plan_chunks(net, x.shape, 4, budget)
    peak = peak_tensor_bytes(lambda: run_net(plain_call(net), x, None, plan))
    assert peak <= budget + 2 * 12 * 64 * 64 * 4


def test_a_graph_ends_before_the_next_begins() -> None:
    """Twice the chunks do not need more than one of them does."""
    net = net_for(False)
    peaks = []
    for n in (2, 8):
        x = torch.randn(n, 6, 32, 32)
        plan = plan_chunks(net, x.shape, 4, 32 * 32 * net.bytes_per_position(4))
        assert len(plan) == n
        peaks.append(backward_peak(net, x, None, plan) - x.numel() * 4)
    assert peaks[0] == peaks[1]


@pytest.mark.full
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(6, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 48, 1), nn.ReLU(), nn.Conv2d(48, 12, 1)),
        nn.Sequential(nn.Conv2d(6, 48, 1), nn.SiLU(), nn.Conv2d(48, 48, 1), nn.SiLU(), nn.Conv2d(48, 12, 1)),
        nn.Sequential(nn.Conv2d(6, 48, 1), nn.GroupNorm(4, 48), nn.ELU(), nn.Conv2d(48, 12, 3, padding=1)),
    ],
    ids=["relu", "silu", "norm"],
)
def test_the_estimate_for_other_nets_is_right_within_two(net: nn.Module) -> None:
    x = torch.randn(1, 6, 48, 48)
    plan = plan_chunks(net, x.shape, 4, 10**12)
    activations = backward_peak(net, x, None, plan) - parameter_bytes(net)
    estimate = 48 * 48 * bytes_per_position(net, 6, 4)
    assert estimate / 2 <= activations <= 2 * estimate
