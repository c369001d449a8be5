"""A live model of another library, faster in place: its layers become ours, its parameters stay where they are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from pyglow_fast._errors import expect
from pyglow_fast.interop.joined import Face, JoinedList
from pyglow_fast.interop.nets import recognised
from pyglow_fast.interop.probing import chain_of
from pyglow_fast.layers.reversible_sequence import MEMORY_MODES

_ADAPTERS = {"normflows": "normflows", "nflows": "nflows", "FrEIA": "freia"}  # top package of a class -> ours for it
_NETS = ("param_map", "transform_net", "subnet", "subnet1", "subnet2")  # where the layers have their nets
_FLOWS = {  # packages of layers; what else the libraries have (distributions, utilities) is not to be replaced
    "normflows": ("normflows.flows",),
    "nflows": ("nflows.transforms",),
    "FrEIA": ("FrEIA.modules",),
}

Join = Callable[[Sequence[nn.Module], str, str | int], list[Any]]


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


@dataclass
class Acceleration:
    """What :func:`accelerate` did to a model, and how it is undone.

    Attributes:
        model: the model.
        replaced: names of the layers that are ours now, and their class.
        left: names of layers and nets that are as they were, and why.
        joined: names of the lists whose steps run in one chain, and how many steps.
    """

    model: nn.Module
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)
    _faces: list[Face] = field(default_factory=list)
    _lists: list[nn.ModuleList] = field(default_factory=list)
    _release: list[Callable[[nn.Module], Any]] = field(default_factory=list)

    def undo(self) -> None:
        """Make the model what it was: the library's own layers, with the weights of now."""
        for module in self._lists:
            module.__class__ = nn.ModuleList
            del module.faces
        for release in self._release:
            release(self.model)
        self._faces, self._lists, self._release = [], [], []
        self.replaced, self.left, self.joined = {}, {}, {}

    def memory_report(self) -> list[dict[str, Any]]:
        """Of each joined run: memory mode, steps, spacing of the anchors, drift, and what was redone."""
        runs = [face.run for face in self._faces]
        return [{"memory": run.memory, "steps": len(run), **run.control.report()} for run in runs]

    def __str__(self) -> str:
        lines = []
        for title, found in (("replaced", self.replaced), ("joined", self.joined), ("left as it was", self.left)):
            lines.append(f"{title}: {len(found)}")
            lines += [f"  {name or '(the model itself)'}: {text}" for name, text in found.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, memory: str | None = None, memory_budget: str | int = "auto") -> Acceleration:
    """Make the layers of normflows, nflows and FrEIA in a model ours, in place.

    Objects, parameters, buffers, hooks and names stay: an optimizer that holds the parameters goes on, a state_dict
    fits as before. Outputs are the same up to rounding, in training and evaluation; what differs on purpose is in the
    adapters' docstrings (pyglow_fast.interop.normflows and so on). Nets of the form 3x3, ReLU, 1x1, ReLU, 3x3 run in
    our executor.

    Args:
        model: with layers of these libraries anywhere in it.
        memory: None: layer by layer. "reversible", "checkpoint" or "store": runs of GlowBlocks (normflows), of mixing
            layers and couplings (nflows), and of AllInOneBlocks (FrEIA's SequenceINN) are joined, fused, and trained in
            that memory mode, see ReversibleSequence. Whoever iterates over or indexes the lists that hold them finds
            one object in the place of a run; data-dependent initialisations happen one by one as before. Hooks put on a
            joined layer later are not called: undo first.
        memory_budget: bytes of one net's activations in a joined run, or "auto".

    Returns:
        What was replaced, joined and left, and why; its ``undo()`` takes all of it back.

    Raises:
        ValueError: a wrong option, or no layer of these libraries in the model.
    """
    expect(memory is None or memory in MEMORY_MODES, "memory", f"None or one of {MEMORY_MODES}", repr(memory))
    expect(isinstance(model, nn.Module), "model", "a Module", type(model).__name__)
    libraries = sorted({_library(module) for module in model.modules()} & set(_ADAPTERS))
    expect(len(libraries) > 0, "model", f"layers of {', '.join(_ADAPTERS)}", "none")
    done = Acceleration(model)
    for library in libraries:
        adapter = importlib.import_module(f"pyglow_fast.interop.{_ADAPTERS[library]}")
        names = adapter.adopt(model)
        done.replaced |= {name: type(model.get_submodule(name)).__qualname__ for name in names}
        done._release.append(adapter.release)
        done.left |= _left(model, library)
    if memory is not None:
        for library in libraries:
            joining = importlib.import_module(f"pyglow_fast.interop.{_ADAPTERS[library]}.joining")
            _join(done, library, joining.join, memory, memory_budget)
    return done


def _left(model: nn.Module, library: str) -> dict[str, str]:
    """Layers of a library that have no counterpart, and nets that our executor does not take."""
    found = {}
    for name, module in model.named_modules():
        home = type(module).__module__
        if home.startswith(_FLOWS[library]) and not any(parent in found for parent in _parents(name)):
            found[name] = f"no counterpart of {type(module).__qualname__}"
        if home.startswith(f"pyglow_fast.interop.{_ADAPTERS[library]}"):
            for attribute in _NETS:
                net = getattr(module, attribute, None)
                if not isinstance(net, nn.Module) or (attribute == "transform_net" and chain_of(net, None) is not None):
                    continue
                reason = recognised(net)
                if isinstance(reason, str):
                    found[f"{name}.{attribute}".lstrip(".")] = f"its net runs as it is: {reason}"
    return found


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _join(done: Acceleration, library: str, join: Join, memory: str, budget: str | int) -> None:
    for name, module in list(done.model.named_modules()):
        if type(module) is not nn.ModuleList or _conditioned(done.model, name):
            continue
        children = list(module)
        if not any(
            type(child).__module__.startswith(f"pyglow_fast.interop.{_ADAPTERS[library]}") for child in children
        ):
            continue
        shown = join(children, memory, budget)
        faces = [item for item in shown if isinstance(item, Face)]
        if faces:
            module.__class__ = JoinedList
            cast(JoinedList, module).faces = shown
            done._faces += faces
            done._lists.append(module)
            steps = ", ".join(str(len(face.run)) for face in faces)
            done.joined[name] = f"{steps} steps in one chain each, memory {memory!r}"


def _conditioned(model: nn.Module, name: str) -> bool:
    """Whether the list belongs to a module that counts its conditions along with it (FrEIA's), and has some."""
    owner = model.get_submodule(name.rpartition(".")[0])
    conditions = getattr(owner, "conditions", None)
    counted = isinstance(conditions, list) and _library(owner) == "FrEIA"
    graph = hasattr(owner, "node_list")  # a GraphINN knows its modules by node
    return graph or (counted and any(condition is not None for condition in conditions or []))
