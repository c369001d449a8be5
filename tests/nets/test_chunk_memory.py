"""Activations stay within the budget, and what a net states is neither too low nor far too high."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import peak_tensor_bytes
from pyglow_fast.nets import Chunk, plain_call, plan_chunks, run_net, run_net_backward
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
@pytest.mark.parametrize("actnorm", [False, True])
@pytest.mark.parametrize("cond_channels", [0, 40])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_net_states_is_enough_and_not_far_too_much(actnorm: bool, cond_channels: int, autocast: bool) -> None:
    """By products of ours, which keep about half of what autograd does."""
    net, x = net_for(actnorm, cond_channels), torch.randn(2, 6, 64, 64)
    cond = torch.randn(2, cond_channels, 64, 64) if cond_channels else None
    plan = plan_chunks(net, x.shape, 4, 10**12)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        activations = backward_peak(net, x, cond, plan) - parameter_bytes(net)
    stated = 2 * 64 * 64 * net.bytes_per_position(4)
    assert activations <= stated
    assert autocast or activations >= 0.4 * stated


@pytest.mark.full
@pytest.mark.parametrize("actnorm", [False, True])
@pytest.mark.parametrize("fraction", [0.25, 0.15])
def test_backward_stays_within_the_budget(actnorm: bool, fraction: float) -> None:
    net, x = net_for(actnorm), torch.randn(2, 6, 64, 64)
    sample = 64 * 64 * net.bytes_per_position(4)
    budget = int(fraction * sample)
    plan = plan_chunks(net, x.shape, 4, budget)
    assert len(plan) > 4
    # Beside the budget: the gradient of x, and the parameters' sums, the chunk's own and the sum of both.
    beside = x.numel() * 4 + 3 * parameter_bytes(net)
    peak = backward_peak(net, x, None, plan)
    assert peak <= budget + beside
    whole = plan_chunks(net, x.shape, 4, 10**12)
    assert backward_peak(net, x, None, whole) > 2 * (budget + beside)  # what the bound would not let pass


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
