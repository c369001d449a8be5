"""Turns layers of normflows into this package's, and back, in place: the same objects, parameters, hooks and flags.

The classes here have no state that normflows' have not (except that an ActNorm remembers whether it has read its flag),
so the class is all that changes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.exchange import Classes, exchange, reversed_classes

OURS: Classes = {}  # normflows' class -> the one that stands in for it


def stands_in(ours: type[nn.Module]) -> Any:
    """Decorate a direct subclass of one of normflows' classes: it is entered as what replaces that class."""
    OURS[ours.__bases__[0]] = ours
    return ours


def adopt(model: nn.Module) -> list[str]:
    """Turn the layers of normflows in a model into this package's, in place, and return their names.

    Layers whose class is exactly normflows' change, ``model`` itself included (its name is ""); subclasses stay.
    """
    names = exchange(model, OURS)
    for module in map(model.get_submodule, names):
        if hasattr(module, "look_at_flag"):
            module.look_at_flag()  # type: ignore[operator]
    return names


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """Undo :func:`adopt`: adopted layers (with ``only``, these alone) become normflows' own, in place."""
    for module in model.modules():
        vars(module).pop("_flag_seen", None)
    return exchange(model, reversed_classes(OURS), only)


def is_untouched(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether a module is of that class and does what it says: no hooks, no methods replaced on the object."""
    return type(module) is expected and not has_hooks(module) and not {"forward", "inverse"} & vars(module).keys()
