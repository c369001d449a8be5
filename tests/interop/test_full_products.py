"""The matrices that the adapters make of other libraries' layers, on a GPU whose products compute in TF32."""

from __future__ import annotations

import importlib
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
@pytest.mark.parametrize("name", ["nflows", "normflows"])
def test_flows(name: str, setting: str) -> None:
    flows = pytest.importorskip(name)
    if name == "nflows":
        layer = flows.transforms.OneByOneConvolution(C)
    else:
        layer = flows.flows.GlowBlock(C, 4)
        layer.flows[2].data_dep_init_done.fill_(1.0)
    table = importlib.import_module(f"pyglow_fast.interop.{name}").LIBRARY
    row = next(row for row in table.rows if row.tells(layer))
    assert_in_full(layer, lambda own: row.elements(own, False)[0].tensors[0], setting)
