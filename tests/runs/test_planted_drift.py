"""States that are wrong are found and what hangs on them is redone, whatever node of a run they are in.

By csrc/run and on the path in Python. Flows that drift of themselves are in the contract.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.captures import drifting, plant
from support.chain_cases import EVERY_STEP, chain, cut_parts, only_python
from support.covering import pairs
from support.gradients import Memory, assert_same_gradients, batch, both_ways, gradients, objective
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast._core.backend import extension
from pyglow_fast.runs import parts, python_steps

DEPTH = 8
compiled_or_not = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
by_nodes = pytest.mark.parametrize("steps", [1, 3, DEPTH], ids="nodes of {}".format)


def enter(patch: pytest.MonkeyPatch, compiled: bool, steps: int) -> None:
    """Let csrc/run or Python run the steps, so many of them in a node."""
    if not compiled:
        only_python(patch)
    elif extension() is None:
        pytest.skip("the run is compiled")
    cut_parts(patch, EVERY_STEP, steps)


def plant_at(patch: pytest.MonkeyPatch, compiled: bool, steps: int, at: int) -> None:
    """Make the state wrong that step ``at`` inverts, or that the node of that step begins from."""
    if compiled:
        plant(patch, 1.01, only=-(-DEPTH // steps) - at // steps)
        return
    true, seen = python_steps.coupling_backward_from_output, []

    def wrong(*inputs: Any) -> tuple[Tensor, ...]:
        found, *grads = true(*inputs)
        seen.append(DEPTH - 1 - len(seen))  # the step: none before this one is redone
        return (1.01 * found if seen[-1] == at else found, *grads)

    patch.setattr(python_steps, "coupling_backward_from_output", wrong)


def built(cond: bool = False) -> tuple[pgf.ReversibleSequence, tuple[Tensor, Tensor | None], dict[str, Tensor]]:
    """A run, a batch for it, and its gradients by ordinary autograd; what drifts beyond 1e-9 is redone."""
    condition = batch(64, 2, 6, 3) if cond else None
    sequence, inputs = chain(DEPTH, condition, tolerance=1e-9), (batch(), None if condition is None else condition[:3])
    Memory("store").apply(sequence)
    return sequence, inputs, gradients(sequence, *inputs)


@both_ways
@pairs(
    by_nodes,
    compiled_or_not,
    pytest.mark.parametrize("every", [None, 2, 3]),
    pytest.mark.parametrize("factor", [1.001, float("nan"), float("inf")]),
)
def test_what_drifts_is_redone(
    steps: int, compiled: bool, every: int | None, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, compiled, steps)
    sequence, inputs, expected = built(cond=True)
    Memory("reversible", every).apply(sequence)
    drifting(monkeypatch, inputs[0]).fill_(factor)
    assert_same_gradients(gradients(sequence, *inputs), expected)
    report = sequence.memory_report()
    assert (report["passes"], report["trips"]) == (1, 1)
    assert report["redone_steps"] >= 1


@both_ways
@pairs(
    by_nodes,
    compiled_or_not,
    pytest.mark.parametrize("at", [1, 3, 6, 7]),
    pytest.mark.parametrize("every", [None, 4]),
)
def test_one_state_alone(
    steps: int, compiled: bool, at: int, every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more is redone than lies between two anchors, or in a node, or than the run where there is no anchor."""
    enter(monkeypatch, compiled, steps)
    sequence, inputs, expected = built()
    Memory("reversible", every).apply(sequence)
    plant_at(monkeypatch, compiled, steps, at)
    assert_same_gradients(gradients(sequence, *inputs), expected)
    report = sequence.memory_report()
    assert (report["passes"], report["trips"]) == (1, 1)
    assert 1 <= report["redone_steps"] <= max(steps, every or DEPTH)
    assert 1e-3 < report["last_drift"] < 1.0


@both_ways
@pairs(by_nodes, compiled_or_not, pytest.mark.parametrize("at", [5, 7]))
def test_behind_parts_without_a_gradient(
    way: str, steps: int, compiled: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first three steps, which are frozen, nothing is kept: the input of the first that is trained is."""
    enter(monkeypatch, compiled, steps)
    sequence, (x, _), expected = built()
    for step in list(sequence)[:: -1 if way == "inverse" else 1][:3]:
        step.requires_grad_(False)
    Memory("reversible", None).apply(sequence)
    plant_at(monkeypatch, compiled, steps, at)
    objective(sequence(x)).backward()
    found = {name: p.grad for name, p in sequence.named_parameters() if p.requires_grad}
    assert_same_gradients(found, {name: expected[name] for name in found})
    assert (sequence.memory_report()["passes"], sequence.memory_report()["trips"]) == (1, 1)


@both_ways
@pairs(by_nodes, compiled_or_not)
def test_judged_at_the_end_as_on_a_gpu(steps: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, compiled, steps)
    sequence, inputs, expected = built()
    Memory("reversible", 2).apply(sequence)
    monkeypatch.setattr(parts, "can_read", lambda x: False)
    for factor, trips in ((1.0, 0), (1.001, 1)):
        drifting(monkeypatch, inputs[0]).fill_(factor)
        assert_same_gradients(gradients(sequence, *inputs), expected)
        assert sequence.memory_report()["trips"] == trips


@both_ways
@pairs(by_nodes, compiled_or_not, pytest.mark.parametrize("factor", [1.0, 1.001, float("nan"), float("inf")]))
def test_deferred(way: str, steps: int, compiled: bool, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts invert; what has drifted makes its own gradients zero, and those of the parts before it.

    The next pass knows of it: its anchors are closer together.
    """
    enter(monkeypatch, compiled, steps)
    sequence, inputs, expected = built()
    Memory("reversible").apply(sequence)
    control, other = sequence.control, sequence.inverse_control
    if way == "inverse":
        control, other = other, control
    control.deferred = True
    drifts = factor != 1.0
    with monkeypatch.context() as patch:
        drifting(patch, inputs[0]).fill_(factor)
        found = gradients(sequence, *inputs)
    assert control.spacing == 4, "not known yet"
    if drifts:
        assert not any(grad.any() for grad in found.values())
    else:
        assert_same_gradients(found, expected)
    assert_same_gradients(gradients(sequence, *inputs), expected)
    assert control.spacing == (2 if drifts else 4)
    report = sequence.memory_report()
    assert (report["passes"], report["redone_steps"]) == (2, 0)
    assert (report["trips"], report["skipped"]) == (drifts, drifts)
    assert (other.report()["passes"], other.spacing) == (0, 4), "each direction has its own record"
