"""What the package offers: the modules that have a page in docs/reference, and their classes and functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from types import ModuleType

from support import ROOT

PACKAGE = "pyglow_fast"
# The module that each page of the reference begins with, but for that of the package itself, whose names are elsewhere.
MODULES = [
    re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)[0]
    for path in sorted((ROOT / "docs" / "reference").glob("*.md"))
    if path.name != "index.md"
]


def public(module: ModuleType) -> Iterator[type]:
    """The classes and functions that a module offers and that are this package's."""
    names = [*getattr(module, "__all__", ()), *(item.__name__ for item in getattr(module, "OURS", ()))]
    for name in names or [name for name in vars(module) if not name.startswith("_")]:
        value = getattr(module, name)
        is_ours = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith(f"{PACKAGE}.")
        if is_ours and (names or value.__module__ == module.__name__):
            yield value
