"""Says how well layers can be inverted: the condition of each one's channel map, and how far a round trip is off."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from pyglow_fast.interop.adoption import run_parts
from pyglow_fast.interop.table import Call, Part
from pyglow_fast.layers.flow_step import after
from pyglow_fast.reversible.steps import ChannelMap

MOST_POSITIONS = 8  # along each dimension of the state that goes there and back


@torch.no_grad()
def health(
    there: Sequence[Sequence[Part]], back: Sequence[Sequence[Part]], shape: Sequence[int] | None
) -> dict[str, list[float]]:
    """Condition numbers of maps, and errors of round trips, by layer from data to latents.

    A state of standard normal numbers goes through the layers; behind each it is inverted once, in the dtype of the
    parameters, and held against what the layer was given: the largest error over the largest value.

    Args:
        there, back: parts of the layers, with their maps, and with the inverses of these.
        shape: of the states, (N, C, *spatial), of which one sample and no more than some positions are taken; None:
            there are no round trips.
    """
    conditions, errors, state = [], [], None
    for forth, own_back in zip(there, back, strict=True):
        maps = [part for part in forth if isinstance(part, ChannelMap)]
        whole = functools.reduce(after, maps) if maps else None
        matrix = torch.eye(1) if whole is None else whole.as_product().matrix
        conditions.append(float(torch.linalg.cond(matrix.double())))
        if shape is None:
            continue
        if state is None:
            sizes = (1, shape[1], *(min(size, MOST_POSITIONS) for size in shape[2:]))
            drawn = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
            state = drawn.to(matrix.device, matrix.dtype)
        z, _ = run_parts(forth, Call(state, False, lambda x, _: x))
        x, _ = run_parts(own_back, Call(z, True, lambda x, _: x))
        errors.append(float((x - state).abs().max() / state.abs().max()))
        state = z
    return {"conditions": conditions, "round_trips": errors}
