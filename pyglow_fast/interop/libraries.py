"""The tables of all libraries whose layers are recognised."""

from __future__ import annotations

import copyreg

from pyglow_fast.interop import antsx, chaiyujin, freia, glow_tts, hiding, jet, nflows, normflows
from pyglow_fast.interop.table import Row

LIBRARIES = (
    normflows.LIBRARY,
    antsx.LIBRARY,
    nflows.LIBRARY,
    freia.LIBRARY,
    chaiyujin.LIBRARY,
    glow_tts.LIBRARY,
    jet.LIBRARY,
    hiding.LIBRARY,
)


def row_named(name: str) -> Row:
    """Find the row of this name in the tables."""
    return next(row for library in LIBRARIES for row in library.rows if row.name == name)


copyreg.pickle(Row, lambda row: (row_named, (row.name,)))  # rows are copied and pickled by their names
