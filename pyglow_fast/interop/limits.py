"""Watches the states of layers that bound what they compute: ours computes without bounds, as long as none would act.

Where one might have, the layers run themselves. Behind a coupling, where a fused pass never writes the state, it is at
most (|u| + |shift|) max(s, 1) of the largest magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast.interop.table import Call, UnfitError
from pyglow_fast.reference import CouplingSpec, scale_and_log

LARGEST_RAW = 700.0  # whose exp float64 holds; that of a larger one is beyond any limit


class BeyondLimitError(UnfitError):
    """Raised where a state may be beyond the limit of the layers that a call is for."""


def magnitude(x: Tensor) -> Tensor:
    """The largest |x|, a scalar; NaN if one is."""
    least, most = torch.aminmax(x.detach())
    return torch.maximum(most, -least)


def note(seen: list[Tensor], spec: CouplingSpec, x: Tensor, net_out: Tensor) -> None:
    """Add the largest magnitudes of a coupling's state, shift and raw scale, (1, 3), as csrc/run notes them."""
    parts = [x, *net_out.chunk(2, 1)] if spec.coupling == "affine" else [x, net_out, x.new_zeros(1)]
    seen.append(torch.stack([magnitude(part).to(x.dtype) for part in parts]).unsqueeze(0))


def check(limit: Tensor, specs: Sequence[CouplingSpec], call: Call, seen: Sequence[Tensor], end: Tensor) -> None:
    """Hold all states of a call against a limit, a scalar. The host reads once.

    Args:
        limit: of the layers.
        specs: of their couplings.
        call: of the layers.
        seen: the largest magnitudes of the couplings in the order of the call, (K, 3) of one or more each.
        end: what the call gives.

    Raises:
        BeyondLimitError: a state may be beyond the limit, or NaN.
    """
    ends = torch.stack([limit.to(end.dtype), magnitude(call.x), magnitude(end)])
    most, *bounds = torch.cat([ends, *(numbers.flatten() for numbers in seen)]).tolist()
    states, shifts, raws = (bounds[i::3] for i in (2, 3, 4))
    bounds = bounds[:2]
    for spec, state, shift, raw in zip(reversed(specs) if call.inverse else specs, states, shifts, raws, strict=True):
        bounds.append((state + shift) * max(_most_scale(spec, call.inverse, raw), 1.0))
    if not all(bound < most for bound in bounds):  # NaN is not
        raise BeyondLimitError(f"values beyond {most:g}, which its own layers may bound")


def _most_scale(spec: CouplingSpec, inverse: bool, raw: float) -> float:
    """The most that s, or inverted 1 / s, can be: scale maps that have a name are monotone."""
    if spec.coupling == "additive":
        return 1.0
    end = min(raw, LARGEST_RAW)
    scale, _ = scale_and_log(torch.tensor([-end, end], dtype=torch.float64, device="cpu"), spec)
    return float(1.0 / scale.min() if inverse else scale.max())
