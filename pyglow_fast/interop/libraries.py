"""The tables of all libraries whose layers are recognised."""

from __future__ import annotations

from pyglow_fast.interop import antsx, chaiyujin, freia, glow_tts, jet, nflows, normflows

LIBRARIES = (
    normflows.LIBRARY,
    antsx.LIBRARY,
    nflows.LIBRARY,
    freia.LIBRARY,
    chaiyujin.LIBRARY,
    glow_tts.LIBRARY,
    jet.LIBRARY,
)
