"""Joins runs of blocks in FrEIA's GraphINN: nodes with one input and one output, which nothing else reads."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, cast

import FrEIA.framework as Ff
from torch import nn

from pyglow_fast.interop.freia.joining import reason_against, stand_ins
from pyglow_fast.interop.joined import ALONE, Face, Joined, Place, Reasons


class JoinedGraph(Joined, Ff.GraphINN):
    """A GraphINN that runs its joined nodes in chains, and one by one where the outputs of all nodes are asked for.

    The graph's nodes, modules and calls are what they were. The chains are in a second graph over the same modules,
    which is no longer used once a node has got another module.
    """

    joined_graph: Ff.GraphINN  # no child of it
    joined_from: list[Any]  # the modules of the nodes when they were joined

    def steps(self) -> list[nn.Module]:
        """List the modules of the graph's nodes."""
        return list(cast(Any, self).module_list)

    def part(self) -> None:
        """Turn the graph into an ordinary GraphINN again."""
        self.__class__ = Ff.GraphINN
        for name in ("faces", "joined_graph", "joined_from"):
            del self.__dict__[name]

    def forward(
        self, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True, intermediate_outputs: bool = False,
        x: Any = None,
    ) -> Any:  # fmt: skip
        """Run the graph, called as GraphINN is."""
        same = all(
            node.module is known for node, known in zip(cast(Any, self).node_list, self.joined_from, strict=True)
        )
        if intermediate_outputs or not same:
            return super().forward(x_or_z, c, rev, jac, intermediate_outputs, x)
        return self.joined_graph.forward(x_or_z, c, rev, jac, x=x)


def join(graph: nn.Module, memory: str, budget: str | int) -> tuple[list[Face], Reasons]:
    """Join the runs of a graph in place; returns what stands for them, and why other modules are in none."""
    if type(graph) is not Ff.GraphINN:
        whose = f"the nodes of a {type(graph).__qualname__} run one by one"
        return [], dict.fromkeys(cast(Any, graph).module_list, whose)
    every: list[Any] = list(cast(Any, graph).node_list)
    nodes = [node for node in every if node.module is not None]
    places = {node: _place(node, memory) for node in nodes}
    reasons = {node.module: places[node].reason or ALONE for node in nodes}
    shown: dict[Any, Any] = {}
    for run in _runs(every, places):
        shown |= zip(run, stand_ins([places[node] for node in run], memory, budget), strict=True)
        for node in run:
            del reasons[node.module]
    faces = [item for item in shown.values() if isinstance(item, Face)]
    if faces:
        second, known = _second_graph(graph, shown), [node.module for node in cast(Any, graph).node_list]
        graph.__class__ = JoinedGraph
        vars(graph).update(faces=faces, joined_graph=second, joined_from=known)
    return faces, reasons


def _place(node: Any, memory: str) -> Place:
    if len(node.inputs) != 1 or len(node.outputs) != 1:
        return Place([node.module], reason="more than one input or output")
    reason = reason_against(node.module, memory)
    conditions = tuple(cond if isinstance(cond, tuple) else (cond, 0) for cond in node.conditions)
    return Place([node.module], None if reason else (node.module.in_channels, conditions), reason=reason)


def _runs(every: list[Any], places: dict[Any, Place]) -> list[list[Any]]:
    """Nodes that follow each other and take the same; no other reader, nor an output of the graph, is between them."""
    readers: Counter[tuple[Any, int]] = Counter()
    uses = Counter(node.module for node in places)
    for node in every:
        readers.update((other, index) for other, index in node.inputs)
        readers.update(cond if isinstance(cond, tuple) else (cond, 0) for cond in node.conditions)
    runs: dict[Any, list[Any]] = {}  # each run by the node that ends it
    for node in places:  # the nodes come in the order of their data
        takes = places[node].takes
        if takes is None or uses[node.module] > 1:
            continue
        before, index = node.inputs[0]
        follows = before in runs and places[before].takes == takes and readers[before, index] == 1
        follows = follows and before.outputs[0][0] is node
        runs[node] = [*runs.pop(before), node] if follows else [node]
    return [run for run in runs.values() if len(run) > 1]


def _second_graph(graph: Any, shown: dict[Any, Any]) -> Ff.GraphINN:
    """A graph over copies of the nodes, some with what stands in for their modules."""
    twins = {node: copy.copy(node) for node in graph.node_list}

    def twin(value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(twin(part) for part in value)
        return twins[value] if value.__hash__ is not None and value in twins else value

    for node, own in twins.items():
        vars(own).update({name: twin(value) for name, value in vars(node).items() if name != "module"})
        own.module = shown.get(node, node.module)
    second = Ff.GraphINN.__new__(Ff.GraphINN)
    vars(second).update({name: twin(value) for name, value in vars(graph).items()})  # the same modules and hooks
    return second
