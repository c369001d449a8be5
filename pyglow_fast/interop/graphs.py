"""Joins runs of blocks in FrEIA's GraphINN: nodes with one input and one output, which nothing else reads."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

from pyglow_fast.interop.joined import Joined, JoinedLayers, Reasons, places_of
from pyglow_fast.interop.known_net import qualified
from pyglow_fast.interop.table import Library

_OF_NODES = ("node_list", "in_nodes", "condition_nodes", "out_nodes")  # of a graph


class JoinedGraph(Joined):
    """A base put before GraphINN, which runs joined nodes in chains, and one by one where all outputs are asked for.

    The graph's nodes, modules and calls are what they were. Chains run over copies of the nodes with the same modules,
    which are no longer used once a node has got another module.
    """

    _shown: dict[str, list[Any]]  # the copies, with what stands in the place of modules
    _joined_from: list[Any]  # the modules of the nodes when they were joined

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the graph's own class."""
        return _blank, (self._pgf_was,), dict(vars(self))

    def forward(
        self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True, intermediate_outputs: bool = False,
        x: Any = None,
    ) -> Any:  # fmt: skip
        """Run the graph, called as GraphINN is."""
        nodes: list[Any] = self.node_list  # type: ignore[assignment]
        same = all(node.module is known for node, known in zip(nodes, self._joined_from, strict=True))
        if intermediate_outputs or not same:
            return super().forward(x_or_z, c, rev, jac, intermediate_outputs, x)
        theirs: Any = self._pgf_was
        shown = theirs.__new__(theirs)
        vars(shown).update(vars(self) | self._shown)
        return shown.forward(x_or_z, c, rev, jac, x=x)


@cache
def _class_for(theirs: Any) -> type[Any]:
    names = {name: getattr(theirs, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(theirs.__name__, (JoinedGraph, theirs), names)


def _blank(theirs: Any) -> Any:
    made: Any = _class_for(theirs)
    return made.__new__(made)


def joined_graph(
    graph: Any, library: Library, memory: str, budget: str | int
) -> tuple[list[Any], list[JoinedLayers], Reasons] | None:
    """Join the runs of a graph in place: its runs, and why other modules are in none; None of what is no graph."""
    if not hasattr(graph, "node_list") or isinstance(graph, Joined):
        return None
    if qualified(type(graph)) != "FrEIA.framework.graph_inn.GraphINN":
        whose = f"the nodes of a {type(graph).__qualname__} run one by one"
        return [], [], dict.fromkeys(graph.module_list, whose)
    every: list[Any] = list(graph.node_list)
    readers: Counter[tuple[Any, int]] = Counter()
    for node in every:
        readers.update((other, index) for other, index in node.inputs)
        readers.update(_conditions(node))
    nodes = _in_chains([node for node in every if node.module is not None])
    uses = Counter(node.module for node in nodes)
    single = {node for node in nodes if len(node.inputs) == 1 and len(node.outputs) == 1 and uses[node.module] == 1}

    def follows(i: int) -> bool:
        if nodes[i] not in single or nodes[i - 1] not in single:
            return False
        return nodes[i].inputs[0] == (nodes[i - 1], 0) and readers[nodes[i - 1], 0] == 1

    layers, conditions = [node.module for node in nodes], [_conditions(node) for node in nodes]
    places, runs, reasons = places_of(layers, conditions, library, memory, budget, follows)
    if runs:
        # Copied are the nodes alone: what they hold stays, and places stand for the modules that are joined.
        copies: dict[int, Any] = {id(node): object.__new__(type(node)) for node in every}
        held = copies | {id(node.module_args): node.module_args for node in every}
        held |= {id(layer): place for layer, place in zip(layers, places, strict=True)}
        for node in every:  # one by one, since each leads to all others
            vars(copies[id(node)]).update(copy.deepcopy(vars(node), held))
        shown = copy.deepcopy({name: getattr(graph, name) for name in _OF_NODES}, held)
        vars(graph).update(places=places, _pgf_was=type(graph), _shown=shown, _joined_from=[n.module for n in every])
        graph.__class__ = _class_for(graph.__class__)
    return places, runs, reasons


def _conditions(node: Any) -> tuple[Any, ...]:
    return tuple(cond if isinstance(cond, tuple) else (cond, 0) for cond in node.conditions)


def _in_chains(nodes: list[Any]) -> list[Any]:
    """The nodes such that each that has one reader is followed by it, where that takes nothing else."""
    found: dict[Any, None] = {}
    after = {node.inputs[0][0]: node for node in reversed(nodes) if len(node.inputs) == 1}
    for node in nodes:
        while node is not None and node not in found:
            found[node] = None
            node = after.get(node)
    return list(found)
