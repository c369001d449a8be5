"""Imports libraries that only data, training and the command line need, where they are used and not before."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

# Where the name to install is not the name to import.
_PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn", "tomli_w": "tomli-w", "yaml": "PyYAML"}
_EXTRAS = {"lmdb": "lmdb", "gradio": "web"}  # where it is not in the extra train


class MissingExtraError(ImportError):
    """A library that one of the package's extras names is not installed; the message says which and how to get it.

    >>> from pyglow_fast.data import MissingExtraError, optional
    >>> try:
    ...     optional("no_such_library", "an example")
    ... except MissingExtraError as error:
    ...     print(str(error).split(" (")[0])
    no_such_library is needed for an example and cannot be imported
    """


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
        raise _missing(module, purpose, str(error)) from error


def check_installed(module: str, purpose: str) -> None:
    """Refuse at once what :func:`optional` will not find; a library that takes long to import is not imported yet.

    Raises:
        MissingExtraError: it is not installed.
    """
    if importlib.util.find_spec(_top(module)) is None:
        raise _missing(module, purpose, "it is not installed")


def _top(module: str) -> str:
    return module.split(".")[0]


def _missing(module: str, purpose: str, reason: str) -> MissingExtraError:
    top = _top(module)
    return MissingExtraError(
        f"{_PACKAGES.get(top, top)} is needed for {purpose} and cannot be imported ({reason}): "
        f'pip install "pyglow-fast[{_EXTRAS.get(top, "train")}]"'
    )
