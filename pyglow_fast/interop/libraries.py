"""The tables of all libraries whose layers are recognised."""

from __future__ import annotations

from pyglow_fast.interop import chaiyujin, freia, glow_tts, jet

LIBRARIES = (freia.LIBRARY, chaiyujin.LIBRARY, glow_tts.LIBRARY, jet.LIBRARY)
