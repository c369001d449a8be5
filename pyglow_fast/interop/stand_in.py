"""Serves layers known by their structure: their class becomes one made of this package's and of their own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from torch import nn


class StandIn(nn.Module):
    """A base of this package's classes for such layers, which :func:`stand_in` puts before a class of the layers.

    The object, its parameters, hooks and other methods stay, and it is still an instance of its own class, whose
    forward is ``super().forward``.
    """

    _ours: type[StandIn]
    _theirs: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the two classes, which can be imported; that made of them is made again."""
        return _blank, (self._ours, self._theirs), dict(vars(self))


_made: dict[tuple[type[StandIn], type[nn.Module]], type[StandIn]] = {}


def stand_in(ours: type[StandIn], theirs: type[nn.Module]) -> type[StandIn]:
    """Make the class, by the name of the layers' own, in which this package's comes first."""
    key = (ours, theirs)
    if key not in _made:
        names = {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__doc__": theirs.__doc__}
        _made[key] = type(theirs.__name__, (ours, theirs), {**names, "_ours": ours, "_theirs": theirs})
    return _made[key]


def _blank(ours: type[StandIn], theirs: type[nn.Module]) -> StandIn:
    adopted_class = stand_in(ours, theirs)
    return adopted_class.__new__(adopted_class)


def give_back(model: nn.Module, ours: type[StandIn], only: Collection[nn.Module] | None) -> list[str]:
    """Give adopted layers (with ``only``, these alone) their own class again; returns their names."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, ours) and (only is None or module in only):
            cast(Any, module).__class__ = module._theirs
            names.append(name)
    return names
