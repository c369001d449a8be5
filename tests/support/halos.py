"""A test of the halo that a net states: how far its output positions see."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from pyglow_fast.nets import plain_call, plan_chunks, run_net
from pyglow_fast.nets.traits import halo_of

SAFETY = 1e4  # roundings of sums in another order are a few eps; a position that is missed shows as 1e-3 or more


def halo_is_enough(net: nn.Module, shape: Sequence[int], cond_channels: int = 0) -> bool:
    """Run a copy of the net on random input whole and in strips of one row with the stated halo, and compare.

    The copy is in float64 and evaluation mode, with random parameters in the place of the net's: a net whose last layer
    starts at zero would agree with anything. A halo that is too large passes; it only costs time. Not seen is what
    needs other input than N(0, 1) to show.
    """
    halo = halo_of(net)
    assert halo is not None
    assert shape[2] >= 2 * halo + 2, "strips are cut on both sides"
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    twin = copy.deepcopy(net).to("cpu", torch.float64).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 1
            parameter.copy_(normal(*parameter.shape) / fan_in**0.5)
    x1 = normal(*shape)
    cond = normal(shape[0], cond_channels, *shape[2:]) if cond_channels else None
    call = plain_call(twin)
    whole = run_net(call, x1, cond, plan_chunks(twin, shape, 8, 2**62))
    strips = run_net(call, x1, cond, plan_chunks(twin, shape, 8, 1))
    scale = float(whole.abs().max())
    assert 0 < scale < float("inf")
    error = float((whole - strips).abs().max()) / scale
    return error <= SAFETY * torch.finfo(whole.dtype).eps
