"""A net that writes to its input changes neither the caller's tensor nor the flow; its training is in the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Own(nn.Module):
    """A module of the user's whose code writes to what it is given."""

    def __init__(self, inputs: int, outputs: int, in_place: bool) -> None:
        super().__init__()
        self.conv, self.in_place = _conv(inputs, outputs), in_place

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """conv(relu(x)), or of the sum with cond."""
        if cond is not None:
            cond = cond.mul_(0.5) if self.in_place else 0.5 * cond
        x = x.relu_() if self.in_place else x.relu()
        return self.conv(x if cond is None else torch.cat([x, cond], dim=1))


def _relu(inputs: int, outputs: int, in_place: bool) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=in_place), _conv(inputs, outputs))


Maker = Callable[[int, int, bool], nn.Module]
NETS: list[Maker] = [_relu, Own]


def _x(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 4, 6, generator=torch.Generator().manual_seed(1))


def _pair(make: Callable[[bool], nn.Module]) -> list[nn.Module]:
    """One module with nets that write, one with nets that do not, of the same parameters."""
    torch.manual_seed(0)
    writes = make(True)
    torch.manual_seed(0)
    return [writes, make(False)]


def _both_ways(layer: nn.Module, x: Tensor, *cond: Tensor) -> list[Tensor]:
    before, before_cond = x.clone(), [c.clone() for c in cond]
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


def _run(net: Maker, in_place: bool) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=net(2, 4, in_place)) for _ in range(3)], memory_budget=4096)
    sequence.initialize(_x())
    return sequence.eval()


LAYERS: dict[str, Callable[[Maker, bool], nn.Module]] = {
    "affine": lambda net, writes: pgf.Coupling(net(2, 4, writes)),
    "additive": lambda net, writes: pgf.Coupling(net(2, 2, writes), "additive"),
    "checkerboard": lambda net, writes: pgf.Coupling(net(4, 8, writes), mask="checkerboard"),
    "additive checkerboard": lambda net, writes: pgf.Coupling(net(4, 4, writes), "additive", mask="checkerboard"),
    "injector": lambda net, writes: pgf.AffineInjector(4, net=net(3, 8, writes)),
    "condition": lambda net, writes: pgf.Coupling(Own(5, 4, writes)),  # the one net here that reads one
    "run in evaluation": _run,
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("net", NETS)
def test_values(net: Maker, layer: str) -> None:
    one, other = _pair(lambda writes: LAYERS[layer](net, writes))
    cond = [torch.randn(3, 3, 4, 6)] if layer in ("injector", "condition") else []
    torch.testing.assert_close(_both_ways(one, _x(), *cond), _both_ways(other, _x(), *cond), rtol=0, atol=0)


class Leaves(Own):
    """It says that it does not write."""

    writes_to_input = False

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Keeps what it is called with."""
        self.seen = x
        return super().forward(x)


def test_a_net_that_states_to_leave_its_input_gets_it() -> None:
    net = Leaves(2, 4, False)
    x = _x()
    with torch.no_grad():
        pgf.Coupling(net)(x)
    assert net.seen.data_ptr() == x.data_ptr()
    net.writes_to_input = "no"
    with pytest.raises(ValueError, match=r"net\.writes_to_input: expected a bool or None, found 'no'"):
        pgf.Coupling(net)(x)
