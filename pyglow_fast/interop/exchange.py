"""Changes the class of layers of a live model, in place: the objects, parameters, buffers and hooks stay."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

Classes = dict[type[nn.Module], type[nn.Module]]


def exchange(model: nn.Module, classes: Classes, only: Collection[nn.Module] | None = None) -> list[str]:
    """Change every layer whose class is exactly a key, ``model`` itself included; returns their names ("" for it).

    With ``only``, these layers alone are changed.
    """
    modules = ((name, module) for name, module in model.named_modules() if only is None or module in only)
    found = [(name, module) for name, module in modules if type(module) in classes]
    for _, module in found:
        module.__class__ = classes[type(module)]
    return [name for name, _ in found]


def reversed_classes(classes: Classes) -> Classes:
    """Swap keys and values of the classes, which undoes an exchange."""
    return {ours: theirs for theirs, ours in classes.items()}
