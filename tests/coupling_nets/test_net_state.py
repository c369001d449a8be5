"""What a recomputation must find again: random numbers, autocast; and what it must refuse to lose."""

from __future__ import annotations

import contextlib
import operator
import re
from typing import Any

import pytest
import torch
from support.helpers import assert_close
from support.net_cases import DropoutNet, WideNet, coupling_net, objective, plain_gradients, randomised
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast._derivatives import check_leaves
from pyglow_fast.coupling_nets import Chunk, plain_call, plan_chunks, run_net, run_net_backward
from pyglow_fast.coupling_nets.state import (
    captured_autocast,
    check_repeated,
    drawing_from,
    generator_states,
    holding,
    leaves_of,
    output_sums,
)

CPU = torch.device("cpu")


def test_random_numbers_are_repeated_and_then_go_on_as_if_nothing_had_been(device: torch.device) -> None:
    states = generator_states(device)
    first, between, expected = (torch.rand(4, device=device) for _ in range(3))
    with drawing_from(states, device):
        torch.rand(8, device=device)
    torch.manual_seed(1)
    with drawing_from(states, device):
        assert torch.equal(torch.rand(4, device=device), first)
        assert torch.equal(torch.rand(4, device=device), between)
        with drawing_from(states, device):
            torch.rand(1, device=device)
        assert torch.equal(torch.rand(4, device=device), expected)
    with contextlib.suppress(RuntimeError), drawing_from(states, device):
        raise RuntimeError
    after = torch.rand(4, device=device)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(4, device=device))


class TestHolding:
    """A net with a module that is there twice, a weight that two modules share, and a module without a bias."""

    @pytest.fixture
    def net(self) -> nn.Sequential:
        twice, tied = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        tied.weight = twice.weight
        return nn.Sequential(twice, nn.ReLU(), twice, tied)

    def test_others_are_held_wherever_the_net_has_its_own(self, net: nn.Sequential) -> None:
        own = list(net.parameters())
        given = [torch.full((3, 3), 0.5), torch.ones(3)]
        x = torch.randn(2, 3)
        for lent in (given, [2.0 * value for value in given]):
            with holding(net, lent):
                hidden = (x @ lent[0].T + lent[1]).relu() @ lent[0].T + lent[1]
                assert torch.equal(net(x), hidden @ lent[0].T)
                with holding(net, given):
                    assert net[3].weight is given[0]
                assert net[3].weight is lent[0]
            assert all(map(operator.is_, net.parameters(), own))
            assert all(isinstance(value, nn.Parameter) for value in net.parameters())

    def test_its_own_are_held_again_after_an_error(self, net: nn.Sequential) -> None:
        own = list(net.parameters())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), holding(net, [torch.ones(3, 5)] * 2):
            net(torch.ones(2, 3))
        assert all(map(operator.is_, net.parameters(), own))
        assert net[0].weight is net[3].weight

    def test_another_number_is_refused(self, net: nn.Sequential) -> None:
        given = [torch.ones(3, 3)] * 3
        with pytest.raises(ValueError, match="net: expected the 3 parameters that its forward ran with, found 2"):
            holding(net, given).__enter__()
        assert net[0].weight is not given[0]

    def test_hooks_are_not_called(self, net: nn.Sequential) -> None:
        """Neither those on a parameter nor those of ``retain_grad``, and what has none stands for itself."""
        made = 2.0 * net[0].weight
        made.retain_grad()
        net[0].weight.register_hook(lambda grad: pytest.fail("called"))
        weight, bias, of_made = leaves_of(net, [*net.parameters(), made])
        assert bias is net[0].bias
        found = torch.autograd.grad((weight + bias + of_made).sum(), [weight, bias, of_made])
        assert [float(grad.sum()) for grad in found] == [9.0, 9.0, 9.0]
        assert made.grad is None
        with pytest.raises(pytest.fail.Exception):
            weight.sum().backward()  # a thread that met it in the net trains the parameter


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("budget", [1, 10**9])
def test_dropout_has_the_same_masks_in_the_recomputation(module: bool, budget: int, device: torch.device) -> None:
    net = randomised(DropoutNet(module)).to(device)
    x, weight = (torch.randn(3, channels, 6, 5, dtype=torch.float64, device=device) for channels in (2, 4))
    params = list(net.parameters())
    plan = plan_chunks(net, x.shape, 8, budget)
    assert len(plan) == (1 if budget > 1 else 3 if module else 18)

    states = generator_states(device)
    out = run_net(plain_call(net), x, None, plan)
    after = torch.rand(1, device=device)
    recomputed = torch.zeros_like(out)

    def consume(part: Tensor, chunk: Chunk) -> Tensor:
        chunk.outputs(recomputed).copy_(part)
        return objective(weight)[1](part, chunk)

    with drawing_from(states, device):
        grad_x, _, grads = run_net_backward(plain_call(net), x, None, plan, consume, params)
    assert torch.equal(recomputed, out)

    # Ordinary autograd of the same masks: the chunks in one graph.
    with drawing_from(states, device):
        leaf = x.clone().requires_grad_()
        parts = [(chunk.crop(net(chunk.inputs(leaf))), chunk.outputs(weight)) for chunk in plan]
        assert torch.equal(torch.rand(1, device=device), after)
    value = torch.stack([objective(of_part)[0](part) for part, of_part in parts]).sum()
    expected = list(torch.autograd.grad(value, [leaf, *params]))
    for got, wanted in zip([grad_x, *grads], expected, strict=True):
        assert_close(got[None], wanted[None], 30.0)

    fresh = run_net(plain_call(net), x, None, plan)
    assert not torch.equal(fresh, out)  # else this test would not have seen other masks


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("samples", [[0, 1, 2], [1]], ids=str)
def test_a_larger_or_a_smaller_output_is_no_repetition(samples: list[int], factor: float) -> None:
    out = 1.0 + torch.rand(3, 4, 6, 5)
    check_repeated(output_sums(out), output_sums((1.0 + 1e-6) * out))
    again = out.clone()
    again[samples] *= factor
    with pytest.raises(ValueError, match=rf"net: expected the same output .* in samples {re.escape(str(samples))}"):
        check_repeated(output_sums(out), output_sums(again))


class TestAutocast:
    def net_and_x(self) -> tuple[nn.Module, Tensor]:
        return coupling_net().float(), torch.randn(3, 2, 9, 4)

    @pytest.mark.parametrize("enabled", [True, False])
    def test_is_entered_again(self, enabled: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            enter = captured_autocast("cpu")
        for outside in (True, False):
            with torch.autocast("cpu", torch.float16, enabled=outside):
                dtype = torch.get_autocast_dtype("cpu")
                for _ in range(2):
                    with enter():
                        assert torch.is_autocast_enabled("cpu") == enabled
                        product = torch.ones(2, 2) @ torch.ones(2, 2)
                        assert product.dtype == (torch.bfloat16 if enabled else torch.float32)
                        if enabled:
                            assert not torch.is_autocast_cache_enabled()
                assert torch.is_autocast_enabled("cpu") == outside
                assert torch.get_autocast_dtype("cpu") == dtype
            assert torch.is_autocast_cache_enabled()

    def test_includes_the_cpu_for_nets_elsewhere(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            enter = captured_autocast("cuda")
        with enter():
            assert torch.is_autocast_enabled("cpu")

    def test_devices_without_it(self) -> None:
        net, x = coupling_net().to("meta"), torch.empty(3, 2, 9, 4, dtype=torch.float64, device="meta")
        with torch.autocast("cpu", torch.bfloat16):
            enter = captured_autocast("meta")
            with enter():
                assert run_net(plain_call(net), x, None, plan_chunks(net, x.shape, 8, 1)).shape == (3, 4, 9, 4)

    @pytest.mark.parametrize("budget", [10**9, 40_000, 1])
    def test_gradients_are_those_of_autocast(self, budget: int) -> None:
        net, x = self.net_and_x()
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
    def test_later_code_in_the_same_region_still_finds_its_gradients(self, budget: int) -> None:
        # A weight cast under no_grad and kept in autocast's cache has no way back to the weight.
        net, x = self.net_and_x()
        params = list(net.parameters())
        plan = plan_chunks(net, x.shape, 4, budget)
        with torch.autocast("cpu", torch.bfloat16):
            run_net(plain_call(net), x, None, plan)
            run_net_backward(plain_call(net), x, None, plan, lambda out, chunk: torch.ones_like(out), params)
            grads = torch.autograd.grad(net(x).float().sum(), params)
        assert all(bool(grad.any()) for grad in grads)
        assert all(grad is not None for grad in grads)

    @pytest.mark.parametrize("budget", [10**9, 1])
    def test_no_copies_of_the_weights_are_kept(self, budget: int) -> None:
        net, x = self.net_and_x()
        params, plan = list(net.parameters()), plan_chunks(net, x.shape, 4, budget)
        with torch.autocast("cpu", torch.bfloat16), MemoryMeter() as meter:
            out = run_net(plain_call(net), x, None, plan)
            assert meter.now == out.untyped_storage().nbytes()
            del out
            run_net_backward(plain_call(net), x, None, plan, lambda out, chunk: torch.ones_like(out), params)
            assert meter.now == 0

    def test_a_gradient_of_another_dtype_than_the_output(self) -> None:
        net, x = WideNet().float(), torch.randn(3, 2, 9, 4)  # the library's, whose output is in bfloat16
        params, plan = list(net.parameters()), plan_chunks(net, x.shape, 4, 1)
        results = []
        for dtype in (torch.float32, torch.bfloat16):

            def consume(out: Tensor, chunk: Chunk, dtype: torch.dtype = dtype) -> Tensor:
                assert out.dtype == torch.bfloat16
                return torch.ones(out.shape, dtype=dtype)  # exact in both

            with torch.autocast("cpu", torch.bfloat16):
                results.append(run_net_backward(plain_call(net), x, None, plan, consume, params)[0])
        assert torch.equal(*results)
        assert results[0].dtype == torch.float32

    def test_parameters_of_another_dtype(self) -> None:
        """Autocast takes them as they are, and they have gradients of their own dtype."""
        net, x = self.net_and_x()
        weight, plan = torch.randn(3, 4, 9, 4), plan_chunks(net, x.shape, 4, 1)
        with torch.no_grad():
            for parameter in net.parameters():  # exact in both dtypes
                parameter.copy_(parameter.bfloat16())
        results = []
        for dtype in (torch.float32, torch.bfloat16):
            net.log_gain = nn.Parameter(net.log_gain.to(dtype))
            net.conv2.to(dtype)
            params = list(net.parameters())
            with torch.autocast("cpu", torch.bfloat16):
                out = run_net(plain_call(net), x, None, plan)
                grad_x, _, grads = run_net_backward(plain_call(net), x, None, plan, objective(weight)[1], params)
            assert [grad.dtype for grad in grads] == [parameter.dtype for parameter in params]
            results.append([out, grad_x, *(grad.float() for grad in grads)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-8, atol=1e-3 * float(one.abs().max()))


class TestLeaves:
    def test_parameters_and_inputs_are_fine(self) -> None:
        net, x = coupling_net(actnorm=True), torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        check_leaves(net(x), [x, *net.parameters()])

    def test_a_missing_parameter(self) -> None:
        net, x = coupling_net(), torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        message = r"net: expected no tensors that require a gradient .*, found one of shape \(5, 2, 3, 3\) in its graph"
        with pytest.raises(ValueError, match=message):
            check_leaves(net(x), [x, *(value for value in net.parameters() if value is not net.conv1.weight)])

    def test_custom_functions_may_keep_what_they_like(self) -> None:
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.variable = x.detach()  # the name that a leaf's node has for its tensor
                return x.square()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return 2.0 * ctx.variable * grad

        leaf = torch.ones(3, requires_grad=True)
        check_leaves(Square.apply(leaf), [leaf])
        with pytest.raises(ValueError, match=r"found one of shape \(3,\)"):
            check_leaves(Square.apply(leaf), [])

    def test_outputs_without_a_graph_are_fine(self) -> None:
        check_leaves(torch.ones(3), [])
        leaf = torch.ones(3, requires_grad=True)
        check_leaves(leaf, [leaf])

    def test_the_history_of_a_known_tensor_is_not_searched(self) -> None:
        source = torch.ones(3, requires_grad=True)
        known = source * 2.0
        check_leaves(known.exp() + known, [known])
        with pytest.raises(ValueError, match=r"found one of shape \(3,\)"):
            check_leaves(known.exp() + source, [known])

    @pytest.mark.parametrize("budget", [10**9, 1])
    @pytest.mark.parametrize("leaf", [True, False])
    def test_a_closed_over_tensor_is_refused(self, budget: int, leaf: bool) -> None:
        net, x = coupling_net(), torch.randn(2, 2, 7, 4, dtype=torch.float64)
        outside = torch.full((7,), 2.0, dtype=torch.float64, requires_grad=True)
        factor = outside.sum() if not leaf else outside
        plan = plan_chunks(net, x.shape, 8, budget)

        def call(x1: Tensor, cond: Tensor | None) -> Tensor:
            return net(x1) * factor.sum()

        for params in ([], list(net.parameters())):
            with pytest.raises(ValueError, match=r"net: expected no tensors .*, found one of shape"):
                run_net_backward(call, x, None, plan, lambda out, chunk: out, params)
        outside.requires_grad_(False)
        factor = outside
        run_net_backward(call, x, None, plan, lambda out, chunk: out, list(net.parameters()))

    def test_checked_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from pyglow_fast.coupling_nets import run

        calls = []
        monkeypatch.setattr(run, "check_leaves", lambda *arguments: calls.append(arguments))
        net, x = pgf.CouplingNet(2, 4, 5), torch.randn(4, 2, 9, 4)
        plan = plan_chunks(net, x.shape, 4, 1)
        run_net_backward(plain_call(net), x, None, plan, lambda out, chunk: out, list(net.parameters()))
        assert len(calls) == 1
