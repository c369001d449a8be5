"""FrEIA's modules by name, those that gain from it in our implementation: swap ``import FrEIA.modules as Fm`` for it.

    import pyglow_fast.interop.freia as Fm

Ours: AllInOneBlock, GLOWCouplingBlock, AffineCouplingOneSided, NICECouplingBlock, ActNorm, IRevNetDownsampling and
-Upsampling, HaarDownsampling and -Upsampling, Fixed1x1Conv. Each is a subclass of FrEIA's class with the same
arguments, parameters, calls and results; its docstring says where FrEIA's goes wrong and it does not. Every other name
is FrEIA's own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import FrEIA.modules as _theirs
from torch import nn

from pyglow_fast.interop.exchange import Classes, exchange, reversed_classes
from pyglow_fast.interop.freia.actnorm import ActNorm
from pyglow_fast.interop.freia.all_in_one import AllInOneBlock, StepParts, step_parts
from pyglow_fast.interop.freia.couplings import AffineCouplingOneSided, GLOWCouplingBlock, NICECouplingBlock
from pyglow_fast.interop.freia.fixed import (
    Fixed1x1Conv,
    HaarDownsampling,
    HaarUpsampling,
    IRevNetDownsampling,
    IRevNetUpsampling,
)
from pyglow_fast.interop.freia.layout import importable

OURS: tuple[type[nn.Module], ...] = (
    ActNorm,
    AffineCouplingOneSided,
    AllInOneBlock,
    Fixed1x1Conv,
    GLOWCouplingBlock,
    HaarDownsampling,
    HaarUpsampling,
    IRevNetDownsampling,
    IRevNetUpsampling,
    NICECouplingBlock,
)
# FrEIA's class -> ours.
ADAPTERS: Classes = {getattr(_theirs, own.__name__): own for own in OURS}

__all__ = [*_theirs.__all__, "ADAPTERS", "StepParts", "adopt", "release", "step_parts"]


def __getattr__(name: str) -> Any:
    """A module of FrEIA that has no counterpart here."""
    return getattr(_theirs, name)


def adopt(model: nn.Module) -> list[str]:
    """Make the FrEIA layers of a live model ours, in place, and return their names.

    The same objects, parameters, buffers and hooks, with our forward. Layers whose class is exactly FrEIA's change,
    ``model`` itself included (its name is ""); subclasses stay.
    """
    names = exchange(model, ADAPTERS)
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, GLOWCouplingBlock | AffineCouplingOneSided | NICECouplingBlock):
            module.f_clamp = importable(module.f_clamp)
    return names


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """The opposite of :func:`adopt`: our layers (with ``only``, these alone) become FrEIA's own again, in place."""
    return exchange(model, reversed_classes(ADAPTERS), only)
