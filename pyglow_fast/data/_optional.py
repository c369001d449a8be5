"""Imports libraries that only data, training and the command line need, where they are used and not before."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

# Where the name to install is not the name to import.
_PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w"}
_EXTRAS = {"gradio": "web"} | {name: name for name in ("tensorboard", "lightning")}  # where it is not `train`


class MissingExtraError(ImportError):
    """A library that one of the package's extras names is not installed; the message says which and how to get it."""


def optional(module: str, purpose: str) -> ModuleType:
    """Import ``module``, such as "PIL.Image", or say by a MissingExtraError what it is needed for."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, purpose, str(error)) from error


def check_installed(module: str, purpose: str) -> None:
    """Refuse at once what :func:`optional` will not find; a library that takes long to import is not imported yet."""
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise _missing(module, purpose, "it is not installed")


def _missing(module: str, purpose: str, reason: str) -> MissingExtraError:
    top = module.split(".")[0]
    return MissingExtraError(
        f"{_PACKAGES.get(top, top)} is needed for {purpose} and cannot be imported ({reason}): "
        f'pip install "pyglow-fast[{_EXTRAS.get(top, "train")}]"'
    )
