"""Jet's couplings of tokens around vision transformers, by structure: those of jet-pytorch and of JetFormer's flow.

Nearly all of their time is that of the transformers, which the library runs as fast as anyone, so the couplings are
left as they are. Where memory is to be saved, in "checkpoint" and "reversible" alike, each keeps its input for the
backward and nothing of its transformer, which runs once more, with the same random numbers and as many samples at a
time as ``memory_budget`` holds: their own code, both times.

Reference: Kolesnikov et al. 2024, Jet: a modern transformer-based normalizing flow.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast.interop.adoption import recomputed_later
from pyglow_fast.interop.joined import JoinedLayers, unrepeatable
from pyglow_fast.interop.table import AS_FAST, Call, Library, Row
from pyglow_fast.nets.plan import budget_bytes
from pyglow_fast.nets.traits import bytes_per_position

__all__ = ["LIBRARY"]

_PROJECTED = ("x", "is_channel", "channel_proj", "spatial_proj")
_CALLS = ((_PROJECTED, _PROJECTED), (("x", "context"), ("y", "context")))  # of forward and inverse


def _arguments(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:] if inspect.isfunction(method) else ()


def _tells(module: nn.Module) -> bool:
    own = type(module)
    has_net = isinstance(getattr(module, "dnn", None), nn.Module)
    return has_net and (_arguments(own.forward), _arguments(getattr(own, "inverse", None))) in _CALLS


def _called(layer: nn.Module, x: Tensor, *rest: Any, **named: Any) -> Call:
    return Call(x, False, lambda z, log_det: (z, log_det), rest=(rest, named))


def _recomputed(layer: Any, call: Call, joined: JoinedLayers | None) -> tuple[Tensor, Tensor]:
    """The layer's own forward, again in the backward, with as many samples at a time as the budget holds."""
    rest, named = call.rest
    x, channels, count = call.x, call.x.shape[-1], len(call.x)
    if joined is not None and named.get("context") is None:  # which is of all samples
        each = bytes_per_position(layer.dnn, channels, x.element_size()) * x[0].numel() // channels
        count = max(1, budget_bytes(joined.budget, x.device.type) // each)
    own = partial(layer._pgf_theirs.forward, layer)
    chunks = [recomputed_later(layer, own, chunk, *rest, **named) for chunk in x.split(count)]
    return torch.cat([z for z, _ in chunks]), torch.cat([log_det for _, log_det in chunks])


LIBRARY = Library(
    "Jet",
    (
        Row(
            "coupling of Jet",
            _tells,
            {"forward": _called},
            lambda layer, inverse: [],
            unfit=lambda layer: unrepeatable(layer.dnn, "checkpoint"),
            alone=lambda layer: f"its {type(layer.dnn).__name__} takes its time: {AS_FAST}",
            pays=lambda layer, call: False,
            run=_recomputed,
        ),
    ),
    one_by_one=True,
)
