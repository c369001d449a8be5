"""Watches the states of layers that bound what they compute: ours computes without bounds, as long as none would act.

Where one might have, the layers run themselves. Behind a coupling, where a fused pass never writes the state, it is at
most (|u| + |shift|) max(s, 1) of the largest magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyglow_fast.interop.table import Call, UnfitError
from pyglow_fast.reference import CouplingSpec, scale_and_log
from pyglow_fast.runs.description import Run
from pyglow_fast.runs.python_steps import magnitude

LARGEST_RAW = 700.0  # whose exp float64 holds; that of a larger one is beyond any limit


class BeyondLimitError(UnfitError):
    """Raised where a state may be beyond the limit of the layers that a call is for."""


def within(
    limit: Tensor | None, run: Run, call: Call, compute: Callable[[Run], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Compute compute(run), a call's state and log_det, and hold all its states against the limit of the layers.

    The host reads once. A state that may be beyond the limit, or is NaN, is a BeyondLimitError; None is no limit.
    """
    if limit is None:
        return compute(run)
    seen: list[Tensor] = []
    end, log_det = compute(run._replace(watch=seen.append))
    ends = torch.stack([limit.to(end.dtype), magnitude(call.x), magnitude(end)])
    most, *bounds = torch.cat([ends, *(numbers.flatten() for numbers in seen)]).tolist()
    states, shifts, raws = (bounds[i::3] for i in (2, 3, 4))
    bounds = bounds[:2]
    for coupling, state, shift, raw in zip(run.couplings, states, shifts, raws, strict=True):
        bounds.append((state + shift) * max(_most_scale(coupling.spec, call.inverse, raw), 1.0))
    if not all(bound < most for bound in bounds):  # NaN is not
        raise BeyondLimitError(f"values beyond {most:g}, which its own layers may bound")
    return end, log_det


def _most_scale(spec: CouplingSpec, inverse: bool, raw: float) -> float:
    """The most that s, or inverted 1 / s, can be: scale maps that have a name are monotone."""
    if spec.coupling == "additive":
        return 1.0
    end = min(raw, LARGEST_RAW)
    scale, _ = scale_and_log(torch.tensor([-end, end], dtype=torch.float64, device="cpu"), spec)
    return float(1.0 / scale.min() if inverse else scale.max())
