"""A test of the halo that a net states: how far its output positions see."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.plan import plan_chunks
from pyglow_fast.coupling_nets.run import plain_call, run_net
from pyglow_fast.coupling_nets.traits import check_net, halo_of

SAFETY = 1e4  # roundings of sums in another order are a few eps; a position that is missed shows as 1e-3 or more


def check_halo(net: nn.Module, shape: Sequence[int], cond_channels: int = 0) -> None:
    """Run a copy of the net on random input whole and in strips of one row with the stated halo, and compare.

    The copy is in float64 and evaluation mode, with random parameters in the place of the net's: a net whose last layer
    starts at zero would agree with anything. A halo that is too large passes; it only costs time. Not seen is what
    needs other input than N(0, 1) to show.

    Args:
        net: states ``halo``; it is not changed, nor are the random generators.
        shape: of x1, (N, C1, *spatial), with at least 2 halo + 2 rows so that strips are cut on both sides.
        cond_channels: Cc, 0 if the net takes no condition.

    Raises:
        ValueError: the halo is too small, or none is stated, or the shape cannot show it.
    """
    check_net(net)
    halo = halo_of(net)
    expect(halo is not None, "net.halo", "an int", None)
    assert halo is not None  # for the type checker: refused above
    enough = len(shape) >= 3 and shape[2] >= 2 * halo + 2 and min(shape) > 0
    expect(enough, "shape", f"(N, C, *spatial) with at least {2 * halo + 2} rows", tuple(shape))

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
    whole = run_net(twin, x1, cond, plan_chunks(twin, shape, 8, 2**62), call)
    strips = run_net(twin, x1, cond, plan_chunks(twin, shape, 8, 1), call)
    scale = float(whole.abs().max())
    expect(0 < scale < float("inf"), "net", "an output that depends on its parameters, without inf or NaN", scale)
    error = float((whole - strips).abs().max()) / scale
    bound = SAFETY * torch.finfo(whole.dtype).eps
    expect(error <= bound, "net.halo", "all that an output position depends on", f"{halo}: an error of {error:.1e}")
