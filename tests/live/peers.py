"""The packages that ``make test-live`` installs, for the tests of this folder."""

from __future__ import annotations

from types import ModuleType

import pytest
from live.light_import import light_import


def load(name: str) -> ModuleType:
    """The module of this full name, such as ``anomalib.models.image.fastflow.torch_model``.

    The test, or the whole file where this is called at its top, is skipped with the name of what is missing.
    """
    try:
        return light_import(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error} (make test-live installs it)", allow_module_level=True)
