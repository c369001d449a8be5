"""Import of one module of a package whose own ``__init__`` needs more than is installed.

anomalib and coqui-tts import a training framework before they give a coupling block away. The module that defines the
block needs torch and FrEIA alone.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import itertools
import sys
from types import ModuleType
from typing import Any

# Modules that a model's file imports for annotations, results and feature extractors, which no flow needs, by package.
BESIDE_THE_FLOW = {
    "anomalib": ("omegaconf", "anomalib.data", "anomalib.models.components.feature_extractors"),
}


class StandIn(ModuleType):
    """A package without its ``__init__``: its modules can be imported, other names are classes that cannot be made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")

        def refuse(*_: object, **__: object) -> object:
            raise ImportError(f"{self.__name__}.{name}: {self.__name__} cannot be imported here")

        return type(name, (), {"__new__": refuse, "__module__": self.__name__})


def light_import(name: str) -> ModuleType:
    """The module of this full name, imported though packages above it may not be importable themselves.

    Each of these stays in ``sys.modules``, as itself where its import succeeds and else as a :class:`StandIn`.

    Raises:
        ImportError: the module, or one that it needs, is not installed.
    """
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise ModuleNotFoundError(f"No module named {top!r}", name=top)
    for package in (*BESIDE_THE_FLOW.get(top, ()), name.rpartition(".")[0]):
        for with_parents in itertools.accumulate(filter(None, package.split(".")), "{}.{}".format):
            _import_or_stand_in(with_parents)
    return importlib.import_module(name)


def _import_or_stand_in(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        _stand_in(name)


def _stand_in(name: str) -> None:
    spec = importlib.util.find_spec(name)
    folders = None if spec is None else spec.submodule_search_locations
    module = StandIn(name)
    module.__path__ = list(folders or ())
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
