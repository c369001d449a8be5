"""The matrices that the adapters make of other libraries' layers, on a GPU whose products compute in TF32."""

from __future__ import annotations

from collections.abc import Callable

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
