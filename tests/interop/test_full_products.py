"""The matrices that the adapters make of other libraries' layers, on a GPU whose products compute in TF32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nflows import transforms
from normflows import flows
from support.helpers import assert_kernel_close
from support.tf32 import SETTINGS, in_tf32

from pyglow_fast.interop import nflows, normflows

pytestmark = pytest.mark.full

C = 12


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("library", [nflows, normflows], ids=["nflows", "normflows"])
def test_flows(library: Any, setting: str) -> None:
    """In TF32 the error is at most twice that in float32."""
    if library is nflows:
        layer: Any = transforms.OneByOneConvolution(C)
    else:
        layer = flows.GlowBlock(C, 4)
        layer.flows[2].data_dep_init_done.fill_(1.0)
    row = next(row for row in library.LIBRARY.rows if row.tells(layer))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        exact, plain = (row.elements(layer.to(dtype), False)[0].tensors[0] for dtype in (torch.float64, torch.float32))
        with in_tf32(setting):
            found = row.elements(layer, False)[0].tensors[0]
    assert_kernel_close(found, plain, exact, magnitude=float(C))
