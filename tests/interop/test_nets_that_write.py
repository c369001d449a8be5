"""Nets of other libraries' models that write to their input: neither the caller's tensor nor the flow changes."""

from __future__ import annotations

from collections.abc import Callable

import FrEIA.modules as Fm
import normflows as nf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

Run = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def _net(inputs: int, outputs: int, in_place: bool) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=in_place), nn.Conv2d(inputs, outputs, 3, padding=1))


def _freia(name: str) -> Callable[[bool], Run]:
    def make(in_place: bool) -> Run:
        block = getattr(Fm, name)([(4, 8, 6)], subnet_constructor=lambda a, b: _net(a, b, in_place))
        accelerate(block)

        def run(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            (out,), log_det = block([x], rev=inverse)
            return out, log_det

        return run

    return make


def _normflows(in_place: bool) -> Run:
    block = nf.flows.GlowBlock(4, 8)
    block.flows[0].flows[1].param_map = _net(2, 4, in_place)
    block.flows[2].data_dep_init_done.fill_(1.0)
    accelerate(block)
    return lambda x, inverse: block.inverse(x) if inverse else block(x)


def _seeded(make: Callable[[bool], Run], in_place: bool) -> Run:
    torch.manual_seed(0)
    np.random.seed(0)  # FrEIA draws its rotations from it
    return make(in_place)


@pytest.mark.parametrize(
    "make",
    [_freia("AllInOneBlock"), _freia("GLOWCouplingBlock"), _normflows],
    ids=["all_in_one", "glow", "normflows"],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_as_one_that_does_not(make: Callable[[bool], Run], gradients: bool) -> None:
    writes, leaves = (_seeded(make, in_place) for in_place in (True, False))
    given = torch.randn(86, 4, 8, 6)
    for inverse in (False, True):
        x = given.clone()
        with torch.set_grad_enabled(gradients):
            found, expected = writes(x, inverse), leaves(given.clone(), inverse)
        assert torch.equal(x, given)
        torch.testing.assert_close(found, expected)
