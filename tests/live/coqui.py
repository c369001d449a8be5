"""Modules of coqui-tts, each imported by itself: the package's own __init__ wants all of what the package needs."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGES = ("TTS", "TTS.tts", "TTS.tts.layers", "TTS.tts.utils")  # and those below, whose __init__ files are not run


def load(name: str) -> Any:
    """Import a module of the package, or skip the test naming what is missing."""
    try:
        spec = importlib.util.find_spec("TTS")
    except ValueError:  # a stub of ours has none
        spec = None
    if "TTS" not in sys.modules and (spec is None or not spec.submodule_search_locations):
        pytest.skip("coqui-tts is not installed (pip install --no-deps coqui-tts)", allow_module_level=True)
    parents = [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]
    for parent in (*parents, *PACKAGES, "TTS.tts.layers.generic", "TTS.tts.layers.glow_tts"):
        if parent not in sys.modules:
            stub = ModuleType(parent)
            home = sys.modules["TTS"].__path__ if parent != "TTS" else spec.submodule_search_locations  # type: ignore[union-attr]
            stub.__path__ = [str(Path(next(iter(home)), *parent.split(".")[1:]))]
            sys.modules[parent] = stub
    return pytest.importorskip(name, reason=f"{name} of coqui-tts wants a package that is not installed")
