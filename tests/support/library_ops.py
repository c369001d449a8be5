"""Coupling nets by the library's convolutions or products on the CPU, as a GPU runs them."""

from __future__ import annotations

import pytest

from pyglow_fast import _backend


def use_library(patch: pytest.MonkeyPatch, way: str = "library") -> None:
    """Makes nets the library's convolutions, or its products of "rows", on the CPU as on a GPU."""
    patch.setattr(_backend, "_nets", lambda: way)
