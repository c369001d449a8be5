"""Random states of every format that ``interop.convert`` reads, and what loads them."""

from __future__ import annotations

from collections.abc import Callable

import pyglow_fast as pgf
from pyglow_fast.interop import convert
from support.peer_glows import State, openai_variables, port_state, rosinality_state

LOADERS: dict[str, tuple[Callable[..., State], Callable[..., pgf.Glow]]] = {
    "openai": (openai_variables, lambda state: convert.load_openai(state, 8)),
    "rosinality": (rosinality_state, lambda state: convert.load_rosinality(state, 8)),
    "chaiyujin": (lambda shape: port_state("chaiyujin", shape), convert.load_chaiyujin),
    "y0ast": (lambda shape: port_state("y0ast", shape), convert.load_y0ast),
}
