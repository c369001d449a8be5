"""The tables of all libraries whose layers are recognised."""

from __future__ import annotations

from pyglow_fast.interop import freia

LIBRARIES = (freia.LIBRARY,)
