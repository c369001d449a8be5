"""Makes a live model of another library faster: its layers become this package's, its parameters stay in place."""

from __future__ import annotations

import copyreg
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from pyglow_fast._core.errors import expect
from pyglow_fast._core.tracing import is_altered
from pyglow_fast.interop import antsx, chaiyujin, freia, glow_tts, hiding, jet, nflows, normflows
from pyglow_fast.interop.adoption import Adopted, adopted_class, give_back
from pyglow_fast.interop.joined import Joined, JoinedLayers, JoinedList, Place, Reasons, places_of, row_of
from pyglow_fast.interop.nets import Net
from pyglow_fast.interop.probe import difference
from pyglow_fast.interop.table import Library, Row, is_ready
from pyglow_fast.nets.plan import budget_bytes
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.setting import MEMORY_MODES, parse_memory

LIBRARIES = [library.LIBRARY for library in (normflows, antsx, nflows, freia, chaiyujin, glow_tts, jet, hiding)]


def row_named(name: str) -> Row:
    """Find the row of this name in the tables."""
    return next(row for library in LIBRARIES for row in library.rows if row.name == name)


copyreg.pickle(Row, lambda row: (row_named, (row.name,)))  # rows are copied and pickled by their names


@dataclass
class Acceleration:
    """A record of what :func:`accelerate` did to a model, which can undo it; it stays after that.

    A copy (copy.deepcopy) has a copy of the model, which it undoes.

    Attributes:
        model: the model.
        replaced: the layers whose forward is this package's, and their class, by name.
        left: the layers and nets that are as they were, and why, by name.
        joined: the containers whose layers run in one chain, and how many steps, by name.

    Examples:
        >>> import normflows
        >>> from pyglow_fast.interop import Acceleration, accelerate
        >>> model = normflows.flows.GlowBlock(channels=4, hidden_channels=8, use_lu=False)
        >>> acceleration = accelerate(model)
        >>> isinstance(acceleration, Acceleration), acceleration.replaced[""]  # the name of the model itself
        (True, 'GlowBlock')
        >>> type(model) is normflows.flows.GlowBlock
        False
        >>> acceleration.undo()
        >>> type(model) is normflows.flows.GlowBlock
        True
    """

    model: nn.Module
    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)
    _adopted: list[nn.Module] = field(default_factory=list)
    _containers: list[Joined] = field(default_factory=list)
    _runs: list[JoinedLayers] = field(default_factory=list)
    _set: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    def undo(self) -> None:
        """Make the model what it was: the library's own layers, with the weights of now.

        Layers that were this package's before the call, and containers that were joined before, stay so.

        Raises:
            RuntimeError: containers of these layers were joined later on, by another call, which is to be undone first.
        """
        for name, module in self.model.named_modules():
            later = isinstance(module, Joined) and module not in self._containers
            if later and not set(self._adopted).isdisjoint(module.modules()):
                raise RuntimeError(f"{name}: joined by a later call of accelerate; undo that first")
        for container in self._containers:
            container.take_apart()
        for module, name, before in self._set:
            setattr(module, name, before)
        give_back(self._adopted)
        self._adopted, self._containers, self._runs, self._set = [], [], [], []

    def memory_report(self) -> list[dict[str, Any]]:
        """Report each joined run: memory mode, steps, spacing of the anchors, drift, and what was redone."""
        return [run.report() for run in self._runs]

    def __str__(self) -> str:
        lines = []
        for title, found in (("replaced", self.replaced), ("joined", self.joined), ("left as it was", self.left)):
            lines.append(f"{title}: {len(found)}")
            lines += [f"  {name or '(the model itself)'}: {text}" for name, text in found.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, memory: str | int | float | None = None, memory_budget: str | int = "auto"
) -> Acceleration:
    """Turn the layers of other projects' flows in a model into this package's, in place.

    Layers are recognised by their class or by their structure, whatever package has them: see docs/switching.md. Each
    is first compared with this package's in float64, on random numbers, and left as it is where the two differ or where
    ours would be slower.

    Objects, parameters, buffers, hooks and names stay: an optimizer that holds the parameters goes on, a state_dict
    fits as before. Outputs are the same up to rounding, in training and evaluation. On the CPU, nets that are chains of
    up to six convolutions which keep the size, with the usual activations, run in this package's
    executor, except where the library's layers would be faster: see pyglow_fast.interop.nets and docs/speed.md. What a
    layer holds (its nets, clamps, masks, permutations) is read at each call.

    Args:
        model: a model with such layers anywhere in it.
        memory: None runs layer by layer. "reversible", "checkpoint" or "store" joins, fuses and trains in that memory
            mode (see ReversibleSequence) the layers that follow one another in a list or a graph of their library, with
            the same conditions or none. Steps that their model calls one by one (chaiyujin's) recompute one by one.
            Whoever iterates over or indexes the lists that hold joined layers finds one object in the place of a run,
            and nothing to do in the others' places; the lists cannot be changed, and a loop that calls the layers in
            another order than their library gets a RuntimeError. The layers run one by one, as before,
            while they wait for data to be initialised from, while there are hooks on them, in other dtypes than float32
            and float64, with a context (nflows), within torch.compile, torch.func and exports (docs/export.md), and in
            the replicas of a DataParallel. Numbers of bytes are for this package's models alone: what these layers'
            nets take is not known.
        memory_budget: bytes of one net's activations in a joined run, or "auto".

    Returns:
        What was replaced, joined and left, and why; its ``undo()`` takes all of it back.

    Raises:
        ValueError: a wrong option, such as bytes, or no such layer in the model.
    """
    mode: Any = None if memory is None else parse_memory(memory)
    by_mode = mode is None or isinstance(mode, str)  # their nets run as they are: no dry run tells their bytes
    expect(by_mode, "memory", f"one of {MEMORY_MODES} for layers of other libraries", repr(memory))
    budget_bytes(memory_budget, "cpu")
    expect(isinstance(model, nn.Module), "model", "a Module", type(model).__name__)
    done = Acceleration(model)
    found = [library for library in LIBRARIES if _adopt(done, library, mode)]
    names = ", ".join(library.name for library in LIBRARIES)
    expected = f"layers of {names}, or of the structures in the documentation"
    expect(bool(found), "model", expected, "none")
    for library in found:
        if mode is not None:
            _join(done, library, mode, memory_budget)
    return done


def _adopt(done: Acceleration, library: Library, mode: str | None) -> bool:
    """Adopt the layers of a library, and report those that are left; whether there are any, adopted before or now."""
    found, spares = False, mode in ("checkpoint", "reversible")
    names = {module: name for name, module in done.model.named_modules()}
    named: set[nn.Module] = set()  # what is in layers that the report names
    inside: set[nn.Module] = set()  # what adopted layers no longer call
    for module, name in names.items():
        if isinstance(module, Adopted):
            found = found or module._pgf_row in library.rows
            named |= set(module.modules())
            inside |= set(module._pgf_row.inside(module))
            continue
        rows = [row for row in library.rows if row.tells(module) and module not in inside]
        why = ""
        for row in rows:
            reason = unlike(row, module)
            if not reason and not spares and (alone := _alone(done.model, name, library, row, mode is not None)):
                reason = f"{alone}, unless memory is to be saved"
            if not reason:
                done._adopted.append(module)
                done.replaced[name] = type(module).__qualname__
                done.left |= _left_in(row, module, names)
                module.__class__ = adopted_class(row, type(module))
                is_ready(row, module)
                inside |= set(row.inside(module))
                break
            why = why or reason
        else:
            if why:
                done.left[name] = why
            elif module not in named and (reason := _no_row(module, library)):
                done.left[name], found = reason, True
        if name in done.replaced or name in done.left:
            named |= set(module.modules())
        found = found or bool(rows) or type(module).__module__.startswith(library.homes or ("nowhere.",))
    return found


def _alone(model: nn.Module, name: str, library: Library, row: Row, joins: bool = False) -> str:
    """Say why a layer is left unless its run saves memory; empty if ours pays anyway, as of a map that a run takes."""
    keys = name.split(".") if name else []
    layer, *owners = (model.get_submodule(".".join(keys[:count])) for count in range(len(keys), -1, -1))
    own = "" if joins and not _has_net(row, layer) else row.alone(layer)
    return own or library.alone([layer, *owners])


def _has_net(row: Row, layer: nn.Module) -> bool:
    """Tell whether a layer has a net to run; maps of channels alone cost nothing in a run with others."""
    return row.run is not None or any(isinstance(part, NetCoupling) for part in row.elements(layer, False))


def unlike(row: Row, module: nn.Module) -> str:
    """Say why a layer that a row tells is not to be adopted; empty if it is."""
    if "forward" in vars(module) or any(map(is_altered, row.inside(module))):
        return "a forward of its own, or hooks in it"
    return row.unfit(module) or ("" if row.example is None else difference(row, module))


def _left_in(row: Row, module: nn.Module, names: dict[nn.Module, str]) -> dict[str, str]:
    """Name the nets of an adopted layer that run as they are, and why."""
    found = {}
    for part in row.elements(module, False):
        net = part.net if isinstance(part, NetCoupling) else None
        if isinstance(net, Net) and net.net in names and isinstance(known := net.known(), str):
            found[names[net.net]] = f"its net runs as it is: {known}"
    return found


def _no_row(module: nn.Module, library: Library) -> str:
    """Why a layer of a library's packages is left; empty of others, and of those that only call what they hold."""
    own = type(module)
    bases = [base for base in own.__mro__ if base.__module__.startswith(library.homes or ("nowhere.",))]
    if not bases or own.__qualname__ in library.containers or own.__module__.startswith("pyglow_fast."):
        return ""
    if bases[0] is own or bases[0].__qualname__ in library.containers:
        return f"no counterpart of {own.__qualname__}"
    return f"{own.__qualname__}, a subclass of {bases[0].__qualname__}: what it changes is not known"


def _join(done: Acceleration, library: Library, memory: str, budget: str | int) -> None:
    """Join the layers of a library, in all containers of a model, and report those that are in no run."""
    if not library.one_by_one or library.lists:
        _join_lists(done, library, memory, budget)
    joined = {layer for run in done._runs for layer in run.layers}
    for name, module in done.model.named_modules() if library.one_by_one else ():
        if module in done._adopted and module._pgf_row in library.rows and module not in joined:
            row = module._pgf_row
            if not _has_net(row, module):
                continue  # there is nothing to keep
            done._runs.append(JoinedLayers([module], [row], memory, budget))
            vars(module)["_pgf_joined"] = done._runs[-1]
            done.joined[name] = f"one step, memory {memory!r}"


def _join_lists(done: Acceleration, library: Library, memory: str, budget: str | int) -> None:
    """Join layers in the containers of a model."""
    reasons: Reasons = {}
    joined: set[nn.Module] = set()
    seen: set[nn.Module] = set()  # within graphs
    for name, container in list(done.model.named_modules()):
        if container in seen:
            continue
        if isinstance(container, Joined):
            if not isinstance(container, nn.ModuleList):
                seen |= set(container.children())
            if container not in done._containers:
                modes = {place.joined.memory for place in container.places if isinstance(place, Place)}
                reasons |= dict.fromkeys(container.modules(), f"joined before, memory {', '.join(sorted(modes))}")
            continue
        found = library.join_graph(container, library, memory, budget)
        if found is not None:
            seen |= set(container.children())
        else:
            if type(container) is not nn.ModuleList or not any(row_of(library, layer) for layer in container):
                continue
            owner = done.model.get_submodule(name.rpartition(".")[0])
            if why := library.keeps(owner):
                reasons |= dict.fromkeys(container, why)
                continue
            conditions = [library.condition(owner, i) for i in range(len(container))]
            found = places_of(list(container), conditions, library, memory, budget)
            if found[1]:
                container.__class__ = JoinedList
                vars(container).update(places=found[0], _pgf_was=nn.ModuleList)
        reasons |= found[2]
        if found[1]:
            done._containers.append(cast(Joined, container))
            done._runs += found[1]
            joined |= {inner for run in found[1] for layer in run.layers for inner in layer.modules()}
            steps = ", ".join(str(run.report()["steps"]) for run in found[1])
            done.joined[name] = f"{steps} steps in one chain each, memory {memory!r}"
    for name, module in done.model.named_modules():
        if joined and library.off_while_joined in vars(module):
            done._set.append((module, library.off_while_joined, vars(module)[library.off_while_joined]))
            setattr(module, library.off_while_joined, False)
        row = row_of(library, module)
        if row is not None and row.run is None and module not in joined and not library.one_by_one:
            reason = f"not joined: {reasons.get(module, 'in no list with others like it')}"
            if module in done._adopted and (alone := _alone(done.model, name, library, row)):
                reason = f"{alone}; {reason}"
                done._adopted.remove(module)
                del done.replaced[name]
                give_back([module])
            done.left[name] = f"{done.left[name]}; {reason}" if name in done.left else reason
