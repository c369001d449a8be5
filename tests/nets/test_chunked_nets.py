"""Chunked nets equal whole ones: outputs and every gradient, at the image's borders too; halos are as stated."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.glow_tts_cases import mask_of_lengths
from support.helpers import assert_close, memory_layouts
from support.net_cases import (
    Consume,
    DilatedNet,
    WideNet,
    coupling_net,
    halo_is_enough,
    objective,
    plain_call,
    plain_gradients,
    randomised,
)
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast.nets.masks import run_by_length
from pyglow_fast.nets.plan import Chunk, plan_chunks
from pyglow_fast.nets.run import run_net, run_net_backward
from pyglow_fast.nets.state import captured_autocast
from pyglow_fast.nets.traits import bytes_per_position

# Sums over positions are formed in another order; values and weights here are of order 1 to 10.
CONDITION = 30.0


# name -> (net, spatial shape, condition channels)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "1d": (lambda: coupling_net(1), (11,), 0),
    "2d": (lambda: coupling_net(2), (9, 4), 0),
    "3d": (lambda: coupling_net(3), (7, 3, 2), 0),
    "actnorm": (lambda: coupling_net(2, actnorm=True), (9, 4), 0),
    "cond": (lambda: coupling_net(2, cond_channels=3), (8, 3), 3),
    "actnorm cond 1d": (lambda: coupling_net(1, True, 2), (9,), 2),
    "one row": (lambda: coupling_net(2), (1, 5), 0),
    "lower than the halo": (lambda: coupling_net(2), (2, 3), 0),
    "one column": (lambda: coupling_net(2), (9, 1), 0),
    "5x5": (lambda: randomised(WideNet()), (13, 6), 0),
    "5x5 cond": (lambda: randomised(WideNet(2, 1)), (12, 5), 1),
    "dilated": (lambda: randomised(DilatedNet()), (15, 5), 0),
    "unknown halo": (lambda: randomised(DilatedNet(halo=None)), (9, 7), 0),
}
# name -> budget as a multiple of one sample's activations
BUDGETS = {"whole": 1000.0, "two samples": 2.0, "one sample": 1.0, "strips": 0.8, "one row": 1e-9}


class Case:
    def __init__(self, name: str, budget: str, n: int = 3) -> None:
        make, spatial, cond_channels = CASES[name]
        self.net, self.params = make(), []
        self.params = list(self.net.parameters())
        self.x = torch.randn(n, 2, *spatial, dtype=torch.float64)
        self.cond = torch.randn(n, cond_channels, *spatial, dtype=torch.float64) if cond_channels else None
        self.weight = torch.randn(n, 4, *spatial, dtype=torch.float64)
        sample = self.x[:1, :1].numel() * bytes_per_position(self.net, 2 + cond_channels, 8)
        self.plan = plan_chunks(
            self.net, self.x.shape, 8, max(1, int(BUDGETS[budget] * sample)), cond_channels=cond_channels
        )

    @property
    def consume(self) -> Consume:
        return objective(self.weight)[1]

    def whole(self) -> Tensor:
        return plain_call(self.net)(self.x, self.cond)

    def backward(self) -> list[Tensor | None]:
        grad_x, grad_cond, grads = run_net_backward(
            plain_call(self.net), self.x, self.cond, self.plan, self.consume, self.params
        )
        return [grad_x, grad_cond, *grads]


def assert_gradients(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert_close(got[None], wanted[None], CONDITION)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_net_in_one_piece(name: str, budget: str) -> None:
    case = Case(name, budget)
    out = run_net(plain_call(case.net), case.x, case.cond, case.plan)
    assert not out.requires_grad
    assert_close(out, case.whole(), CONDITION)
    assert_gradients(case.backward(), plain_gradients(case.net, case.x, case.cond, case.weight, case.params))


def test_the_cases_are_cut_as_they_are_called() -> None:
    def strips(name: str, budget: str) -> int:
        return len({chunk.rows.start for chunk in Case(name, budget).plan})

    assert Case("2d", "whole").plan[0].whole
    assert len(Case("2d", "two samples").plan) == 2
    assert len(Case("2d", "one sample").plan) == 3
    for name, (_, spatial, _) in CASES.items():
        cut = name not in ("one row", "lower than the halo", "unknown halo")
        assert strips(name, "one row") == (spatial[0] if cut else 1)
    assert 1 < strips("2d", "strips") < 9
    assert all(chunk.rows.stop - chunk.rows.start < 4 for chunk in Case("5x5", "one row").plan)


@pytest.mark.parametrize("budget", ["whole", "one sample", "strips"])
class TestWantedGradients:
    def test_inputs_not_wanted(self, budget: str) -> None:
        case = Case("cond", budget)
        call, expected = plain_call(case.net), plain_gradients(case.net, case.x, case.cond, case.weight, case.params)
        arguments = (call, case.x, case.cond, case.plan, case.consume, case.params)
        for needs_x1, needs_cond in ((False, False), (True, False), (False, True)):
            grad_x, grad_cond, grads = run_net_backward(*arguments, needs_x1=needs_x1, needs_cond=needs_cond)
            wanted = [expected[0] if needs_x1 else None, expected[1] if needs_cond else None, *expected[2:]]
            assert_gradients([grad_x, grad_cond, *grads], wanted)

    def test_two_parameters_with_one_gradient(self, budget: str) -> None:
        # Autograd returns one tensor for both: sums that are formed in place must not be formed twice.
        case = Case("2d", budget)
        first, second = (nn.Parameter(torch.randn(1, 4, 1, 1, dtype=torch.float64)) for _ in range(2))

        def call(x1: Tensor, cond: Tensor | None) -> Tensor:
            return case.net(x1) + (first + second)

        leafs = [first, second]
        _, _, grads = run_net_backward(call, case.x, None, case.plan, case.consume, leafs + case.params)
        expected = torch.autograd.grad(objective(case.weight)[0](call(case.x, None)), leafs)
        assert_gradients(list(grads[:2]), list(expected))


@pytest.mark.parametrize("budget", ["whole", "one sample", "strips"])
def test_layouts(budget: str) -> None:
    """Channels-last comes out as it went in."""
    case = Case("2d", budget)
    expected, whole, layouts = case.backward(), case.whole(), memory_layouts(case.x)
    for name, case.x in layouts.items():
        out = run_net(plain_call(case.net), case.x, None, case.plan)
        assert_close(out, whole, CONDITION)
        assert name != "channels_last" or out.is_contiguous(memory_format=torch.channels_last)
        assert_gradients(case.backward(), expected)


@pytest.mark.parametrize("budget", [1, 10**9])
def test_data_without_positions(budget: int) -> None:
    net = randomised(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)))
    x, weight = (torch.randn(5, channels, dtype=torch.float64) for channels in (2, 4))
    plan = plan_chunks(net, x.shape, 8, budget)
    assert len(plan) == (5 if budget == 1 else 1)
    assert_close(run_net(plain_call(net), x, None, plan), net(x), CONDITION)
    params = list(net.parameters())
    grad_x, _, grads = run_net_backward(plain_call(net), x, None, plan, objective(weight)[1], params)
    assert_gradients([grad_x, None, *grads], plain_gradients(net, x, None, weight, params))


def test_low_precision_gradients_are_summed_in_float32() -> None:
    scale = nn.Parameter(torch.ones(1, 2, 1, 1, dtype=torch.bfloat16))
    x = torch.ones(1000, 2, 1, 1, dtype=torch.bfloat16)
    plan = plan_chunks(nn.Identity(), x.shape, 2, 1)
    assert len(plan) == 1000
    _, _, (grad,) = run_net_backward(
        lambda x1, c: x1 * scale, x, None, plan, lambda out, c: torch.ones_like(out), [scale]
    )
    assert grad.dtype == torch.bfloat16
    assert torch.equal(grad, torch.full_like(scale, 1000.0))  # one by one in bfloat16 it ends at 256


@pytest.mark.parametrize(
    ("net", "shape", "cond_channels"),
    [
        (coupling_net(1), (2, 2, 9), 0),
        (coupling_net(2, actnorm=True), (1, 2, 7, 3), 0),
        (coupling_net(3, cond_channels=2), (1, 2, 6, 2, 2), 2),
        (pgf.CouplingNet(2, 4, 5, border=True), (2, 2, 9, 4), 0),
        (pgf.DenseNet(2, 4, 3), (2, 2, 12, 4), 0),
        (pgf.WaveNet(2, 4, 4, 3, 2, 3), (1, 2, 23), 0),
        (pgf.WaveNet(2, 4, 4, 5, 1, 3), (1, 2, 21), 0),
        (WideNet(2, 1), (1, 2, 12, 3), 1),
        (DilatedNet(), (1, 2, 16, 4), 0),
    ],
)
def test_the_halo_that_is_stated_is_enough_and_a_smaller_one_is_not(
    net: nn.Module, shape: tuple[int, ...], cond_channels: int
) -> None:
    assert halo_is_enough(net, shape, cond_channels)
    for smaller in range(net.halo):
        short = copy.copy(net)
        vars(short).pop("halo", None)
        short.__class__ = type("Short", (type(net),), {"halo": smaller})
        assert not halo_is_enough(short, shape, cond_channels)


# ---- Under autocast ----


def net_and_x() -> tuple[nn.Module, Tensor]:
    return coupling_net().float(), torch.randn(3, 2, 9, 4)


@pytest.mark.parametrize("budget", [10**9, 40_000, 1])
def test_gradients_are_those_of_autocast(budget: int) -> None:
    net, x = net_and_x()
    params, weight = list(net.parameters()), torch.randn(3, 4, 9, 4)
    plan = plan_chunks(net, x.shape, 4, budget)
    with torch.autocast("cpu", torch.bfloat16):
        enter = captured_autocast("cpu")
        out = run_net(plain_call(net), x, None, plan)
        assert out.dtype == net(x).dtype
        expected = plain_gradients(net, x, None, weight, params)
    exact = plain_gradients(net, x, None, weight, params)

    recomputed = torch.zeros_like(out)

    def consume(part: Tensor, chunk: Chunk) -> Tensor:
        chunk.outputs(recomputed).copy_(part)
        return objective(weight)[1](part, chunk)

    with enter():
        grad_x, _, grads = run_net_backward(plain_call(net), x, None, plan, consume, params)
    assert torch.equal(recomputed, out)  # without autocast it would be off by bfloat16's rounding
    assert not torch.equal(out.float(), net(x))
    for got, wanted, true in zip([grad_x, None, *grads], expected, exact, strict=True):
        if got is None:
            continue
        assert got.dtype == torch.float32
        error, plain_error = (float((value - true).norm()) for value in (got, wanted))
        assert error <= 2.0 * plain_error + 4.0 * torch.finfo(torch.bfloat16).eps * float(true.norm()) / len(params)


@pytest.mark.parametrize("budget", [10**9, 1])
def test_no_casts_of_the_weights_are_kept(budget: int) -> None:
    """They take memory, and where autocast keeps one that was made without gradients, later code trains no weight."""
    net, x = net_and_x()
    params, plan = list(net.parameters()), plan_chunks(net, x.shape, 4, budget)
    with torch.autocast("cpu", torch.bfloat16), MemoryMeter() as meter:
        out = run_net(plain_call(net), x, None, plan)
        assert meter.now == out.untyped_storage().nbytes()
        del out
        run_net_backward(plain_call(net), x, None, plan, lambda out, chunk: torch.ones_like(out), params)
        assert meter.now == 0


# ---- Cut behind the ends of sequences ----


@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 3, 7), (4, 2, 1), (0, 0, 0)])
@pytest.mark.parametrize("positions", [None, 1, 9])
def test_cutting_by_length_changes_nothing(lengths: tuple[int, ...], positions: int | None) -> None:
    x, mask = torch.randn(3, 2, 9, dtype=torch.float64), mask_of_lengths(lengths, 9)
    cond = None if positions is None else torch.randn(3, 2, positions, dtype=torch.float64)
    weight = torch.randn(4, 2, 3, dtype=torch.float64)
    widths = []

    def call(x: Tensor, cond: Tensor | None, mask: Tensor) -> Tensor:
        widths.append(x.shape[0] * x.shape[2])
        out = nn.functional.conv1d(x * mask, weight, padding=1)
        return (out if cond is None else out + cond.repeat(1, 2, 1)) * mask

    found = run_by_length(call, x, cond, mask)
    work = sum(widths)
    assert torch.allclose(found, call(x, cond, mask), rtol=1e-13, atol=1e-13)
    assert work <= 27
    assert lengths == (9, 9, 9) or work < 27
