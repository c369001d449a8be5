"""Offers all of ``normflows.flows``, with this package's layers in the place of normflows' own."""

from __future__ import annotations

from typing import Any

import normflows.flows

from pyglow_fast.interop.normflows.coupling import AffineCoupling, AffineCouplingBlock
from pyglow_fast.interop.normflows.glow import GlowBlock
from pyglow_fast.interop.normflows.layers import ActNorm, Invertible1x1Conv, Permute, Squeeze

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "AffineCouplingBlock",
    "GlowBlock",
    "Invertible1x1Conv",
    "Permute",
    "Squeeze",
]


def __getattr__(name: str) -> Any:
    """Every other name."""
    return getattr(normflows.flows, name)
