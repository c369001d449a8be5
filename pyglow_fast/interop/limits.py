"""Watches the states of layers that bound what they compute: ours computes without bounds, as long as none would act.

Where one might have, the layers run themselves. Behind a coupling, where a fused pass never writes the state, it is at
most (|u| + |shift|) s of the largest magnitudes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyglow_fast.interop.adoption import net_output, run_parts
from pyglow_fast.interop.table import Call, Couples, Part, UnfitError
from pyglow_fast.reference import CouplingSpec


def magnitude(x: Tensor) -> Tensor:
    """The largest |x|, a scalar; NaN if one is."""
    least, most = torch.aminmax(x.detach())
    return torch.maximum(most, -least)


class Watch:
    """The largest values of one call of layers in a row."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def __call__(self, largest: Tensor) -> None:
        """Note those of some couplings, in the order of the call: of state, shift and raw scale, (K, 3)."""
        self._seen.append(largest)

    def look(self, part: Couples, x: Tensor, net_out: Tensor) -> Tensor:
        """Note those of one coupling, and pass its net's output on."""
        if part.spec.coupling == "additive":
            found = [magnitude(x), magnitude(net_out), x.new_zeros(())]
        else:
            found = [magnitude(x), *map(magnitude, net_out.chunk(2, 1))]
        self._seen.append(torch.stack([value.to(x.dtype) for value in found]).unsqueeze(0))
        return net_out

    def check(self, limit: Tensor, specs: Sequence[CouplingSpec], call: Call, end: Tensor) -> None:
        """Hold all states of a call against a limit, a scalar; ``end`` is what the call gives. The host reads once.

        Raises:
            UnfitError: one may be beyond it.
        """
        ends = torch.stack([limit.to(end.dtype), magnitude(call.x), magnitude(end)])
        most, begin, last, *numbers = torch.cat([ends, *(seen.flatten() for seen in self._seen)]).tolist()
        triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        bounds = [begin, last]
        for spec, (state, *others) in zip(reversed(specs) if call.inverse else specs, triples, strict=True):
            bounds += [state, _coupled(spec, call.inverse, state, *others)]
        if not all(bound < most for bound in bounds):  # NaN is not
            raise UnfitError(f"values beyond {most:g}, which its own layers may bound")


def watched(limit: Callable[[Sequence[Any]], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the ``run`` of a row whose layers are bounded so."""

    def run(layer: Any, call: Call, parts: Sequence[Part], own: Any) -> tuple[Tensor, Tensor]:
        watch = Watch()
        found = run_parts(parts, call, lambda part, x, cond: watch.look(part, x, net_output(part, x, cond)))
        specs = [part.spec for part in parts if isinstance(part, Couples)]
        watch.check(limit([layer]), specs, call, found[0])
        return found

    return run


def _coupled(spec: CouplingSpec, inverse: bool, state: float, shift: float, raw: float) -> float:
    """The most that a coupling makes of a state."""
    if spec.coupling == "additive":
        return state + shift
    scale = _scale(spec, inverse, raw)
    return (state + shift) * scale if (spec.order == "shift_scale") != inverse else state * scale + shift


def _scale(spec: CouplingSpec, inverse: bool, raw: float) -> float:
    """The most that s, or inverted 1 / s, can be."""
    if spec.scale_map == "sigmoid":
        least = spec.eps + spec.factor / (1.0 + math.exp(min(raw - spec.bias, 700.0)))
        return spec.eps + spec.factor if not inverse else 1.0 / least
    capped = {"exp": 700.0, "tanh": spec.clamp, "atan": spec.clamp}.get(str(spec.scale_map))
    return math.inf if capped is None else math.exp(min(raw, capped) if spec.scale_map != "atan" else capped)
