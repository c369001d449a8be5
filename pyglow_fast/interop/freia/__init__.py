"""Offers FrEIA's modules by name, those that gain from it in a faster form: to replace ``import FrEIA.modules``.

    import pyglow_fast.interop.freia as Fm

These are this package's: AllInOneBlock, GLOWCouplingBlock, AffineCouplingOneSided, NICECouplingBlock, ActNorm,
    IRevNetDownsampling and -Upsampling, HaarDownsampling and -Upsampling, Fixed1x1Conv. Each is a subclass of FrEIA's
    class with the same arguments, parameters, calls and results; its docstring says what FrEIA's does wrong and this
    one does right. Every other name is FrEIA's own.
-Upsampling, HaarDownsampling and -Upsampling, Fixed1x1Conv. Each is a subclass of FrEIA's class with the same
arguments, parameters, calls and results; its docstring says where FrEIA's goes wrong and it does not. Every other name
is FrEIA's own.

FrEIA's release 0.2 and its git since August 2023 have the same version number. Their AllInOneBlocks differ, and the one
here computes what that of the installed FrEIA does; the ActNorm of git is another layer, and stays FrEIA's own.

:func:`adopt` takes, besides these classes, copies of AllInOneBlock in other code bases (anomalib's, for one): a layer
is adopted if it has the attributes of a block and a probe in float64 finds that it computes the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import FrEIA.modules as _theirs
from torch import nn

from pyglow_fast.interop import nets
from pyglow_fast.interop.exchange import Classes, exchange, reversed_classes
from pyglow_fast.interop.freia.actnorm import ActNorm, forgets_closure, tells_itself
from pyglow_fast.interop.freia.all_in_one import AllInOneBlock, ServedBlock, StepParts, step_parts, without_closures
from pyglow_fast.interop.freia.couplings import AffineCouplingOneSided, GLOWCouplingBlock, NICECouplingBlock
from pyglow_fast.interop.freia.fixed import (
    Fixed1x1Conv,
    HaarDownsampling,
    HaarUpsampling,
    IRevNetDownsampling,
    IRevNetUpsampling,
)
from pyglow_fast.interop.freia.layout import importable
from pyglow_fast.interop.freia.verified import Variant, counterpart, variant_of_installed

OURS: tuple[type[nn.Module], ...] = (
    ActNorm,
    AffineCouplingOneSided,
    AllInOneBlock,
    Fixed1x1Conv,
    GLOWCouplingBlock,
    HaarDownsampling,
    HaarUpsampling,
    IRevNetDownsampling,
    IRevNetUpsampling,
    NICECouplingBlock,
)
_variant = variant_of_installed()
if isinstance(_variant, Variant):
    AllInOneBlock._divides, AllInOneBlock._fixed_size = _variant
# FrEIA's class -> the class here. Left out are classes of an installed FrEIA that compute something else.
_SAME = {"AllInOneBlock": isinstance(_variant, Variant), "ActNorm": hasattr(_theirs.ActNorm, "_initialize_with_data")}
ADAPTERS: Classes = {getattr(_theirs, own.__name__): own for own in OURS if _SAME.get(own.__name__, True)}
for _name, _is_same in _SAME.items():
    if not _is_same:  # the name is then FrEIA's
        del globals()[_name]

__all__ = [*_theirs.__all__, "ADAPTERS", "StepParts", "adopt", "release", "step_parts"]


def __getattr__(name: str) -> Any:
    """A module of FrEIA that has no counterpart here."""
    return getattr(_theirs, name)


def adopt(model: nn.Module) -> list[str]:
    """Turn the FrEIA layers of a live model into this package's, in place, and return their names.

    Objects, parameters, buffers and hooks stay the same; the forward is this package's. Layers whose class is FrEIA's
    change, and blocks that were verified to compute what AllInOneBlock does, ``model`` itself included (its name is
    ""); others stay, see :func:`left`.
    """
    names = []
    for name, module in model.named_modules():
        own = counterpart(module, ADAPTERS)
        if not isinstance(own, type):
            continue
        module.__class__ = own
        names.append(name)
        if isinstance(module, GLOWCouplingBlock | AffineCouplingOneSided | NICECouplingBlock):
            module.f_clamp = importable(module.f_clamp)
        elif isinstance(module, ServedBlock):
            without_closures(module)
        elif type(module).__name__ == "ActNorm":
            forgets_closure(module)
    return names


def release(model: nn.Module, only: Collection[nn.Module] | None = None) -> list[str]:
    """Undo :func:`adopt`: adopted layers (with ``only``, these alone) become what they were again, in place."""
    blocks = {type(module) for module in model.modules() if vars(type(module)).get("_home") is type(module)}
    back = reversed_classes(ADAPTERS) | {block: cast(type[ServedBlock], block)._serves for block in blocks}
    names = exchange(model, back, only)
    for name in names:
        module = model.get_submodule(name)
        vars(module).pop("_seen", None)
        if type(module).__name__ == "ActNorm":
            tells_itself(module)
    return names


def finds(model: nn.Module) -> bool:
    """Whether a model has layers that may be AllInOneBlocks, of whatever code base."""
    return any(counterpart(module, ADAPTERS) is not None for module in model.modules())


def left(model: nn.Module) -> dict[str, str]:
    """Name the layers that are not adopted, and why: those without a counterpart, or that FrEIA's containers add."""
    found = {}
    for name, module in model.named_modules():
        reason = counterpart(module, ADAPTERS)
        if isinstance(reason, str):
            found[name] = reason
        dense = isinstance(module, ServedBlock) and module.input_rank > 0 and module.is_dense
        if dense and isinstance(nets.recognised(module.subnet), str):
            what = f"a soft permutation of {module.in_channels} channels around a net that runs as it is"
            found[name] = f"{what}: on the CPU its own forward is as fast"
        if type(module).__module__.startswith("FrEIA.framework"):
            steps = getattr(module, "module_list", nn.ModuleList())
            for key, step in steps._modules.items():
                step_class = type(step)
                if not step_class.__module__.startswith((__name__, "FrEIA.")) and counterpart(step, ADAPTERS) is None:
                    found[f"{name}.module_list.{key}".lstrip(".")] = f"no counterpart of {step_class.__qualname__}"
    return found
