"""Chunks under autocast."""

from __future__ import annotations

import pytest
import torch
from support.net_cases import coupling_net, objective, plain_gradients
from torch import Tensor, nn

from bench.memory_meter import MemoryMeter
from pyglow_fast.nets import Chunk, plain_call, plan_chunks, run_net, run_net_backward
from pyglow_fast.nets.state import (
    captured_autocast,
)


class TestAutocast:
    def net_and_x(self) -> tuple[nn.Module, Tensor]:
        return coupling_net().float(), torch.randn(3, 2, 9, 4)

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
