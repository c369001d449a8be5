"""FrEIA's modules by name, those that gain from it in our implementation: swap ``import FrEIA.modules as Fm`` for it.

    import pyglow_fast.interop.freia as Fm

Ours: AllInOneBlock, GLOWCouplingBlock, AffineCouplingOneSided, NICECouplingBlock, ActNorm, IRevNetDownsampling and
-Upsampling, HaarDownsampling and -Upsampling, Fixed1x1Conv. Each is a subclass of FrEIA's class with the same
arguments, parameters, calls and results; its docstring says where FrEIA's goes wrong and it does not. Every other name
is FrEIA's own.

FrEIA's release 0.2 and its git since August 2023 call themselves by the same number. Their AllInOneBlocks differ, and
ours computes what that of the installed one does; the ActNorm of git, another layer, is left FrEIA's.

:func:`adopt` takes, besides these classes, copies of AllInOneBlock in other code bases (anomalib's, for one): a layer
becomes ours if it has the attributes of a block and a probe in float64 finds that it computes what ours does.
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
# FrEIA's class -> ours, of those that are what ours were made for.
_SAME = {"AllInOneBlock": isinstance(_variant, Variant), "ActNorm": hasattr(_theirs.ActNorm, "_initialize_with_data")}
ADAPTERS: Classes = {getattr(_theirs, own.__name__): own for own in OURS if _SAME.get(own.__name__, True)}
for _name, _is_same in _SAME.items():
    if not _is_same:  # so that the name is FrEIA's
        del globals()[_name]

__all__ = [*_theirs.__all__, "ADAPTERS", "StepParts", "adopt", "release", "step_parts"]


def __getattr__(name: str) -> Any:
    """A module of FrEIA that has no counterpart here."""
    return getattr(_theirs, name)


def adopt(model: nn.Module) -> list[str]:
    """Make the FrEIA layers of a live model ours, in place, and return their names.

    The same objects, parameters, buffers and hooks, with our forward. Layers whose class is FrEIA's change, and blocks
    that were verified to compute what AllInOneBlock does, ``model`` itself included (its name is ""); others stay, see
    :func:`left`.
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
    """The opposite of :func:`adopt`: our layers (with ``only``, these alone) become what they were again, in place."""
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
    """The layers that are not ours, and why: those that are no counterpart, or that FrEIA's containers have besides."""
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
