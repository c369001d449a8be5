"""Third parties that only data, training and the command line need are imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

# Where the name to install is not the name to import.
_PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w", "yaml": "PyYAML"}
_EXTRAS = {"lmdb": "lmdb", "gradio": "web"}  # where it is not in the demo extra


class MissingExtraError(ImportError):
    """A library of an extra is not installed; the message says which and how to get it."""


def optional(module: str, purpose: str) -> ModuleType:
    """Import ``module``, or say what it is needed for and how to install it.

    Args:
        module: dotted name, such as ``"PIL.Image"``.
        purpose: what it is needed for, for the message.

    Raises:
        MissingExtraError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.split(".")[0]
        package = _PACKAGES.get(top, top)
        raise MissingExtraError(
            f"{package} is needed for {purpose} and cannot be imported ({error}): "
            f'pip install "pyglow-fast[{_EXTRAS.get(top, "demo")}]"'
        ) from error
