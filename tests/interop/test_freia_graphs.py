"""Runs of blocks in GraphINNs: what is joined, with the values, gradients and calls of the graph as it was."""

from __future__ import annotations

import copy
import re

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import pytest
import torch
from support.accelerate_cases import assert_same, at_work
from support.helpers import assert_close
from support.structures import blocks_after, graph_of_stages
from torch import Tensor

from pyglow_fast.interop import accelerate


def states(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *shape, dtype=torch.float64) for shape in shapes]


def test_all_that_a_graph_can_be_asked_for() -> None:
    """Each node's output and log-det, no log-dets, nodes by name, another input by name, the numerical log-det."""
    theirs = at_work(graph_of_stages())
    ours, xs = copy.deepcopy(theirs), states((8, 4, 4), (3, 8, 8))
    accelerate(ours, "store")
    for rev in (False, True):
        given = list(theirs(xs)[0]) if rev else xs
        (outputs, log_dets), (expected, expected_log_dets) = (
            model(given, rev=rev, intermediate_outputs=True) for model in (ours, theirs)
        )
        assert [(node.name, i) for node, i in outputs] == [(node.name, i) for node, i in expected]
        assert_close(outputs.values(), expected.values(), 100.0)
        assert_close(log_dets.values(), expected_log_dets.values(), 100.0)
    assert not ours(xs, jac=False)[1].any()
    assert ours.get_module_by_name("first1") is ours.get_node_by_name("first1").module
    with pytest.warns(UserWarning, match="x is now called x_or_z"):
        assert_close(ours(None, x=xs)[1], theirs(xs)[1], 100.0)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_conditions(memory: str) -> None:
    """Neighbours with the same ones are joined, with two at a time too."""
    torch.manual_seed(0)
    start, conds = Ff.InputNode(4, 6, 6), [Ff.ConditionNode(2, 6, 6, name="a"), Ff.ConditionNode(3, 6, 6, name="b")]
    nodes = blocks_after(start, 2, "both", conditions=conds)
    nodes += blocks_after(nodes[-1], 1, "first", conditions=conds[0])
    nodes += blocks_after(nodes[-1], 2, "second", conditions=conds[1])
    nodes += blocks_after(nodes[-1], 2, "none", Fm.AllInOneBlock)
    theirs = at_work(Ff.GraphINN([start, *conds, *nodes, Ff.OutputNode(nodes[-1])]))
    ours = copy.deepcopy(theirs)
    done = accelerate(ours, memory)
    assert done.joined == {"": f"2, 2, 2 steps in one chain each, memory {memory!r}"}
    assert [reason for reason in done.left.values() if "joined" in reason] == [
        "not joined: no layer of its width and split next to it"
    ]
    x, *c = states((4, 6, 6), (2, 6, 6), (3, 6, 6))
    for rev in (False, True):
        assert_same(ours, theirs, lambda of, x, *c, rev=rev: of(x, c=list(c), rev=rev), x, *c)


def test_what_somebody_else_reads_ends_a_run() -> None:
    """Here an output of the graph, which FrEIA can only run forward then."""
    torch.manual_seed(0)
    start = Ff.InputNode(4, 6, 6)
    nodes = blocks_after(start, 2, "first")
    tap = Ff.OutputNode(nodes[1], name="tap")
    nodes += blocks_after(nodes[1], 2, "second")
    theirs = at_work(Ff.GraphINN([start, *nodes, tap, Ff.OutputNode(nodes[-1], name="end")]))
    ours = copy.deepcopy(theirs)
    assert accelerate(ours, "store").joined == {"": "2, 2 steps in one chain each, memory 'store'"}
    (tapped, end), log_det = ours(x := states((4, 6, 6))[0])
    (wanted, last), expected = theirs(x)
    assert_close((tapped, end, log_det), (wanted, last, expected), 100.0)


def test_graphs_that_run_node_by_node() -> None:
    """One of another class, and one that has a module in two nodes."""

    class Mine(Ff.GraphINN):  # type: ignore[misc]
        pass

    for kind in (Mine, Ff.GraphINN):
        start = Ff.InputNode(4, 6, 6)
        nodes = blocks_after(start, 3, "block")
        model = kind([start, *nodes, Ff.OutputNode(nodes[-1])])
        if kind is Ff.GraphINN:
            model.node_list[2].module = model.node_list[1].module
        done = accelerate(model, "store")
        assert done.joined == {}
        if kind is Mine:
            assert re.fullmatch(r"not joined: the nodes of a .*Mine run one by one", done.left["module_list.0"])
