"""What :func:`pyglow_fast.interop.accelerate` does with layers of libraries that are not yet tables."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from torch import nn

from pyglow_fast.interop.joined import Face, Joined, JoinedList, Reasons, join
from pyglow_fast.interop.nets import recognised
from pyglow_fast.interop.probing import chain_of

_ADAPTERS: dict[str, str] = {}  # top package of a class -> ours for it
# Adapters of classes that are recognised by their structure, whatever package they are in. Such an adapter has the
# functions finds(model) -> bool and left(model), which names what it leaves and why, besides adopt and release.
_BY_STRUCTURE: tuple[str, ...] = ()
_NETS = ("param_map", "transform_net", "subnet", "subnet1", "subnet2", "F", "G")  # where the layers have their nets
_FLOWS: dict[str, tuple[str, ...]] = {}  # packages of layers
# Flows that only call other flows in turn: nothing of them is replaced but what they hold.
_CONTAINERS = ("CompositeTransform", "MultiscaleCompositeTransform", "InverseTransform", "Composite", "Reverse")


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


@dataclass
class Acceleration:
    """A record of what :func:`accelerate` did to a model, which can undo it.

    A copy (copy.deepcopy) has a copy of the model, which it undoes.

    Attributes:
        model: the model.
        replaced: the layers that are this package's now, and their class, by name.
        left: the layers and nets that are as they were, and why, by name.
        joined: the lists whose steps run in one chain, and how many steps, by name.
    """

    model: nn.Module
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)
    _faces: list[Face] = field(default_factory=list)
    _lists: list[Joined] = field(default_factory=list)
    _adopted: dict[str, set[nn.Module]] = field(default_factory=dict)  # the adopted modules, by library

    def undo(self) -> None:
        """Make the model what it was: the library's own layers, with the weights of now.

        Layers that were this package's before the call, and lists that were joined before, stay so.

        Raises:
            RuntimeError: lists of these layers were joined later on, by another call, which is to be undone first.
        """
        changed = set().union(*self._adopted.values())
        for name, module in self.model.named_modules():
            later = isinstance(module, Joined) and module not in self._lists
            if later and not changed.isdisjoint(module.modules()):
                raise RuntimeError(f"{name}: joined by a later call of accelerate; undo that first")
        for module in self._lists:
            module.part()
        for library, modules in self._adopted.items():
            _adapter(library).release(self.model, modules)
        self._faces, self._lists, self._adopted = [], [], {}
        self.replaced, self.left, self.joined = {}, {}, {}

    def memory_report(self) -> list[dict[str, Any]]:
        """Report each joined run: memory mode, steps, spacing of the anchors, drift, and what was redone."""
        return [face.run.memory_report() for face in self._faces]

    def __str__(self) -> str:
        lines = []
        for title, found in (("replaced", self.replaced), ("joined", self.joined), ("left as it was", self.left)):
            lines.append(f"{title}: {len(found)}")
            lines += [f"  {name or '(the model itself)'}: {text}" for name, text in found.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, mode: str | None, memory_budget: str | int) -> Acceleration | None:
    """Turn such layers of a model into this package's, in place; None if there are none."""
    known = {_library(module) for module in model.modules()} & set(_ADAPTERS)
    libraries = sorted(known | {name for name in _BY_STRUCTURE if name not in known and _finds(name, model)})
    if not libraries:
        return None
    done = Acceleration(model)
    for library in libraries:
        names = _adapter(library).adopt(model)
        done.replaced |= {name: type(model.get_submodule(name)).__qualname__ for name in names}
        done._adopted[library] = {model.get_submodule(name) for name in names}
        if library in _ADAPTERS:
            done.left |= _left(model, library)
        if library in _BY_STRUCTURE:
            done.left |= _adapter(library).left(model)
    if mode is not None:
        for library in libraries:
            if _has(library, ".joining"):
                _join(done, library, mode, memory_budget)
            if hasattr(_adapter(library), "recompute"):
                done.joined |= _adapter(library).recompute(model, mode, memory_budget)
    return done


def _more(known: str | None, reason: str) -> str:
    """Why a layer is left as it was, with a reason why it is not joined."""
    return f"not joined: {reason}" if known is None else f"{known}; not joined: {reason}"


def _adapter(library: str, part: str = "") -> Any:
    return importlib.import_module(f"pyglow_fast.interop.{_ADAPTERS.get(library, library)}{part}")


def _has(library: str, part: str) -> bool:
    return importlib.util.find_spec(part, _adapter(library).__name__) is not None


def _finds(name: str, model: nn.Module) -> bool:
    """Whether an adapter by structure finds layers in a model."""
    return bool(_adapter(name).finds(model))


def _left(model: nn.Module, library: str) -> dict[str, str]:
    """Layers of a library that have no counterpart, and nets that our executor does not take."""
    found: dict[str, str] = {}
    ours: set[str] = set()
    for name, module in model.named_modules():
        home = type(module).__module__
        if home.startswith(f"pyglow_fast.interop.{_ADAPTERS[library]}"):
            ours.add(name)
            for attribute in _NETS:
                net = getattr(module, attribute, None)
                if isinstance(net, nn.Module) and (reason := _net_reason(net, attribute)):
                    found[f"{name}.{attribute}".lstrip(".")] = f"its net runs as it is: {reason}"
        elif not any(parent in found or parent in ours for parent in _parents(name)):
            reason = _no_counterpart(type(module), library)
            found |= {name: reason} if reason else {}
    return found


def _no_counterpart(module_class: type, library: str) -> str:
    """Why a class is left as it is, or nothing if there is nothing to say."""
    if module_class.__module__.startswith(_FLOWS[library]):
        return "" if module_class.__qualname__ in _CONTAINERS else f"no counterpart of {module_class.__qualname__}"
    if module_class.__module__.partition(".")[0] in (*_ADAPTERS, "pyglow_fast"):
        return ""
    base = next((base for base in module_class.__mro__ if base.__module__.startswith(_FLOWS[library])), None)
    if base is None:
        return ""
    return f"{module_class.__qualname__}, a subclass of {base.__qualname__}: what it changes is not known"


def _net_reason(net: nn.Module, attribute: str) -> str:
    """Why our executor does not run a net, or nothing."""
    chain = chain_of(net, None) if attribute == "transform_net" else None  # nflows' nets take a context
    reason = recognised(net if chain is None else chain)
    if not isinstance(reason, str):
        return ""
    if attribute != "transform_net":
        return reason
    forward = f"{type(net).__qualname__}.forward"
    return f"in {forward}, {reason}" if chain is not None else f"{forward} is not known to be a chain of layers"


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return ["", *(".".join(parts[:i]) for i in range(1, len(parts)))] if name else []


def _join(done: Acceleration, library: str, memory: str, budget: str | int) -> None:
    joining = _adapter(library, ".joining")
    reasons: Reasons = {}
    for name, module in list(done.model.named_modules()):
        if isinstance(module, Joined):
            if module not in done._lists:
                modes = {item.run.memory for item in module.faces if isinstance(item, Face)}
                reasons |= dict.fromkeys(module.steps(), f"joined before, memory {', '.join(sorted(modes))}")
            continue
        if type(module) is nn.ModuleList and any(isinstance(child, joining.STEPS) for child in module):
            owner = done.model.get_submodule(name.rpartition(".")[0])
            places = joining.places(list(module), owner, memory)
            shown, why = join(places, partial(joining.stand_ins, memory=memory, budget=budget))
            faces = [item for item in shown if isinstance(item, Face)]
            if faces:
                module.__class__ = JoinedList
                cast(JoinedList, module).faces = shown
        else:
            continue
        reasons |= why
        if faces:
            done._faces += faces
            done._lists.append(cast(Joined, module))
            steps = ", ".join(str(len(face.run)) for face in faces)
            done.joined[name] = f"{steps} steps in one chain each, memory {memory!r}"
    joined = {step for face in done._faces for step in face.modules}
    for name, module in done.model.named_modules():
        if isinstance(module, joining.STEPS) and module not in joined:
            reason = reasons.get(module, "in no list with others like it")
            done.left[name] = _more(done.left.get(name), reason)
