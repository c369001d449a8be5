"""The matrices that the adapters make of other libraries' layers, on a GPU whose products compute in TF32."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support.helpers import assert_kernel_close
from support.tf32 import SETTINGS, in_tf32
from torch import Tensor, nn

pytestmark = pytest.mark.full

C = 12
by_setting = pytest.mark.parametrize("setting", SETTINGS)


def assert_in_full(module: nn.Module, function: Callable[[nn.Module], Tensor], setting: str) -> None:
    """In TF32 the error is at most twice that in float32, of a function of a module with random parameters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        exact, plain = (function(module.to(dtype)) for dtype in (torch.float64, torch.float32))
        with in_tf32(setting):
            found = function(module)
    assert_kernel_close(found, plain, exact, magnitude=float(C))


@by_setting
def test_nflows(setting: str) -> None:
    pytest.importorskip("nflows")
    from pyglow_fast.interop.nflows.transforms import OneByOneConvolution

    assert_in_full(OneByOneConvolution(C), lambda conv: conv.weight(), setting)


@by_setting
def test_normflows(setting: str) -> None:
    pytest.importorskip("normflows")
    from pyglow_fast.interop.normflows.flows import Invertible1x1Conv

    assert_in_full(Invertible1x1Conv(C, use_lu=True), lambda conv: conv.weight_and_log_det()[0], setting)


class Chaiyujin(nn.Module):
    """What a map is made of, of a step with an LU convolution."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("p", "l", "u"):
            self.register_parameter(name, nn.Parameter(torch.eye(C) + 0.3 * torch.randn(C, C)))
        self.log_s, self.bias, self.logs = (nn.Parameter(0.1 * torch.randn(C)) for _ in range(3))

    def map(self) -> Tensor:
        from pyglow_fast.interop.chaiyujin.structure import channel_map

        conv = SimpleNamespace(
            LU=True, p=self.p, l=self.l, u=self.u, log_s=self.log_s, sign_s=torch.ones_like(self.log_s)
        )
        actnorm = SimpleNamespace(logs=self.logs, bias=self.bias)
        found = channel_map(SimpleNamespace(actnorm=actnorm, invconv=conv, flow_permutation="invconv"))
        return torch.cat([found.matrix, found.offset[None]])


@by_setting
def test_chaiyujin(setting: str) -> None:
    assert_in_full(Chaiyujin(), lambda step: step.map(), setting)
