"""Leaves figures undrawn: laying out and drawing its curves is nine tenths of the smallest run there is.

What is plotted is computed as ever; in place of the drawing a picture of one pixel is written. Tests of pictures are
marked ``drawn``.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from PIL import Image

drawing = False  # whether figures are drawn after all

_draw = Figure.savefig


def _save(figure: Figure, to: Any, **options: Any) -> None:
    """Stand in for ``Figure.savefig``."""
    if drawing:
        _draw(figure, to, **options)
    else:
        Image.new("RGB", (1, 1)).save(to, "PNG")


def leave_undrawn() -> None:
    """Leave the figures of this process undrawn from now on, unless ``drawing`` is set."""
    Figure.savefig = _save
