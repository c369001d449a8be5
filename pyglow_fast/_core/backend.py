"""Finds the compiled extension, or says why the torch reference runs instead and how to build the extension.

Nothing happens when this module is imported: the extension is loaded by the first call that asks for it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from pyglow_fast._core.errors import expect
from pyglow_fast._core.torch_private import constant_in_graphs

EXTENSION = "pyglow_fast._C"
HOW_TO_BUILD = (
    "To build it for the torch installed here, run in the source tree: "
    "pip install --upgrade 'setuptools>=77' wheel cmake ninja && pip install --no-build-isolation ."
)


def extension() -> ModuleType | None:
    """The compiled module, or None where the reference is used; :func:`reason` then says why."""
    return _load()[0]


def reason() -> str:
    """The reason why the reference is used, and what to do about it; empty if the extension is loaded."""
    return _load()[1]


def build_info() -> dict[str, str]:
    """The torch, compiler, instruction sets and CUDA that the loaded extension was built with; empty without one."""
    module = extension()
    return {} if module is None else module.build_info()


@functools.cache
def require() -> ModuleType:
    """The compiled module; where there is none, an ImportError that says why and how to build it."""
    module, why = _load()
    if module is None:
        raise ImportError(f"{EXTENSION}: {why}", name=EXTENSION)
    return module


def release(version: str) -> tuple[str, ...]:
    """The part of a torch version that decides binary compatibility: 2.13 of 2.13.0+cpu."""
    return tuple(version.split("+")[0].split(".")[:2])


@constant_in_graphs
def nets() -> str:
    """Say who computes coupling nets: "auto" (docs/speed.md), the "library"'s convolutions, or its products ("rows").

    Raises:
        ValueError: the environment variable PYGLOW_NETS says something else.
    """
    return _nets()


@functools.cache
def _nets() -> str:
    choice = os.environ.get("PYGLOW_NETS") or "auto"
    expect(choice in ("auto", "library", "rows"), "PYGLOW_NETS", "auto, library or rows", repr(choice))
    return choice


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("PYGLOW_FORCE_REFERENCE", "0") not in ("", "0"):
        return None, "PYGLOW_FORCE_REFERENCE is set"
    if importlib.util.find_spec(EXTENSION) is None:
        return None, (
            "the compiled extension is not installed for this Python (no C++ compiler was found at installation, "
            f"PYGLOW_NO_EXTENSION was set, or the source tree was never built). {HOW_TO_BUILD}"
        )
    try:
        module = importlib.import_module(EXTENSION)
        built_for = module.build_info()["torch"]
    except (ImportError, AttributeError, KeyError) as error:
        return None, _unusable(f"the compiled extension cannot be loaded beside torch {torch.__version__}: {error}.")
    if release(built_for) != release(torch.__version__):
        return None, _unusable(
            f"the compiled extension was built for torch {built_for}, but torch {torch.__version__} is installed."
        )
    try:
        module.register_kernels()
    except (AttributeError, RuntimeError) as error:
        return None, _unusable(f"the compiled extension was built from other sources than these: {error}.")
    return module, ""


def is_loaded() -> bool:
    """Tells whether the extension has been looked for: then it is loaded, or will not be."""
    return _load.cache_info().currsize > 0


def _unusable(problem: str) -> str:
    """An extension that is there but does not work is worth a warning: whoever built it expects its speed."""
    why = f"{problem} {HOW_TO_BUILD}"
    warnings.warn(f"pyglow_fast runs on the slow torch reference: {why}", RuntimeWarning, stacklevel=4)
    return why
