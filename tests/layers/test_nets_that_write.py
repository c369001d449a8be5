"""A net that writes to its input changes neither the caller's tensor nor the flow; its training is in the contract."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.user_steps import Writes
from torch import Tensor, nn

import pyglow_fast as pgf


def _relu(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(inputs, outputs, 3, padding=1))


Maker = Callable[[int, int], nn.Module]
NETS: list[Maker] = [_relu, Writes]


def _x() -> Tensor:
    return torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(1))


def _both_ways(layer: nn.Module, x: Tensor, *cond: Tensor) -> list[Tensor]:
    before, before_cond = x.clone(), [c.clone() for c in cond]
    layer.initialize(x, *cond)
    with torch.no_grad():
        y, log_det = layer(x, *cond)
        assert torch.equal(x, before), "forward has written to the caller's tensor"
        y_before = y.clone()
        back, inverse_log_det = layer.inverse(y, *cond)
        assert torch.equal(y, y_before), "inverse has written to the caller's tensor"
    assert all(map(torch.equal, cond, before_cond)), "the condition was written to"
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-4, atol=1e-4)
    return [y, log_det]


def _run(net: Maker) -> pgf.ReversibleSequence:
    steps = [pgf.FlowStep(4, net=net(2, 4)) for _ in range(3)]
    return pgf.ReversibleSequence(steps, memory_budget=4096).eval()


LAYERS: dict[str, Callable[[Maker], nn.Module]] = {
    "affine": lambda net: pgf.Coupling(net(2, 4)),
    "additive": lambda net: pgf.Coupling(net(2, 2), "additive"),
    "checkerboard": lambda net: pgf.Coupling(net(4, 8), mask="checkerboard"),
    "additive checkerboard": lambda net: pgf.Coupling(net(4, 4), "additive", mask="checkerboard"),
    "injector": lambda net: pgf.AffineInjector(4, net=net(3, 8)),
    "condition": lambda net: pgf.Coupling(Writes(5, 4)),  # the one net here that reads one
    "run in evaluation": _run,
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("net", NETS)
def test_values(net: Maker, layer: str) -> None:
    writes = LAYERS[layer](net)
    leaves = copy.deepcopy(writes)
    for module in leaves.modules():
        module.inplace = module.in_place = False
    cond = [torch.randn(3, 3, 4, 6)] if layer in ("injector", "condition") else []
    torch.testing.assert_close(_both_ways(writes, _x(), *cond), _both_ways(leaves, _x(), *cond), rtol=0, atol=0)


class Leaves(Writes):
    """It says that it does not write."""

    writes_to_input = False

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Keeps what it is called with."""
        self.seen = x
        return self.conv(x)


def test_a_net_that_states_to_leave_its_input_gets_it() -> None:
    net = Leaves(2, 4)
    x = _x()
    with torch.no_grad():
        pgf.Coupling(net)(x)
    assert net.seen.data_ptr() == x.data_ptr()
    net.writes_to_input = "no"
    with pytest.raises(ValueError, match=r"net\.writes_to_input: expected a bool or None, found 'no'"):
        pgf.Coupling(net)(x)
