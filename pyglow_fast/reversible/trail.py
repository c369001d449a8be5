"""The trail of a backward: what it hands on from a part of a run to the part before it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from pyglow_fast._derivatives import backward_key
from pyglow_fast.reversible.maps import OpenGroup
from pyglow_fast.reversible.parts import Part


@dataclass
class KnownStates:
    """True states of a part from one of its steps on, counted from the part's own first one."""

    first: int
    x: Tensor  # the input of that step
    states: list[Tensor]  # u of it and of those behind it


@dataclass
class Trail:
    """Where a backward has come to, and what it has found that the parts to come need.

    Attributes:
        y: the output of the part that is next, recomputed or true.
        maps: the group of channel maps that is open.
        known: by index of parts to come, what a drift has made known of them.
        thread: that the backward runs in.
    """

    y: Tensor | None = None
    maps: OpenGroup | None = None
    known: dict[int, KnownStates] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)


class Trails:
    """The trails of all backwards through one graph: with retain_graph there may be several, also at the same time."""

    def __init__(self) -> None:
        self._trails: dict[tuple[int, int], Trail] = {}

    def of(self, part: Part) -> Trail:
        """Find the trail of the backward that is under way, from its beginning at the last part to its end."""
        key, own = backward_key(), threading.get_ident()
        if part.is_last:
            # What an earlier backward has left that failed, or wanted late gradients alone.
            for other, trail in list(self._trails.items()):  # a list, as other threads may add theirs meanwhile
                if trail.thread == own and other[0] != key[0]:
                    del self._trails[other]
            self._trails[key] = Trail()
        return self._trails.pop(key) if part.is_final else self._trails[key]
