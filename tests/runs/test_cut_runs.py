"""The contract's gradients where a run is cut into parts, each a node of its own, and on the path in Python.

Elsewhere a run as small as those of the tests is one node, which csrc/run computes if all steps are the package's own.
"""

from __future__ import annotations

import copy

import pytest
import torch
from contract import test_gradients as of_flows
from contract import test_gradients_of_own_nets as of_nets
from contract import test_gradients_with_torch as with_torch
from support.chain_cases import EVERY_STEP, ONE_PART, cut_parts, only_python
from support.gradients import RECOMPUTING, Memory, assert_same_gradients, batch, both_ways, gradients, objective
from support.user_steps import RUNS, Build, runs

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter

# Who computes the steps, and how many of them are a part.
HOMES = [
    pytest.param((True, 1), id="compiled, parts of 1"),
    pytest.param((False, 2), id="python, parts of 2"),
    pytest.param((True, 3), id="compiled, parts of 3", marks=pytest.mark.full),
]


@pytest.fixture(autouse=True, params=HOMES)
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    is_compiled, steps = request.param
    cut_parts(monkeypatch, EVERY_STEP, steps)
    if not is_compiled:
        only_python(monkeypatch)


@pytest.mark.full
class TestTheContract:
    """What it says of gradients holds wherever a run is cut."""

    test_every_kind_of_step = staticmethod(of_flows.test_every_kind_of_step)
    test_every_kind_of_run = staticmethod(of_flows.test_every_kind_of_run)
    test_sequences_with_padding = staticmethod(of_flows.test_sequences_with_padding)
    test_few_samples = staticmethod(of_flows.test_few_samples)
    test_states_that_cannot_be_inverted_at_all = staticmethod(of_flows.test_states_that_cannot_be_inverted_at_all)
    test_frozen_parameters = staticmethod(of_flows.test_frozen_parameters)
    test_a_condition_alone = staticmethod(of_flows.test_a_condition_alone)
    test_losses_of_single_outputs = staticmethod(of_flows.test_losses_of_single_outputs)
    test_dropout = staticmethod(of_nets.test_dropout)
    test_nets_that_are_trained = staticmethod(of_nets.test_nets_that_are_trained)
    test_threads = staticmethod(of_nets.test_threads)
    test_several_backwards = staticmethod(with_torch.test_several_backwards)
    test_batches_of_gradients = staticmethod(with_torch.test_batches_of_gradients)
    test_hooks_on_saved_tensors_and_anomaly_mode = staticmethod(with_torch.test_hooks_on_saved_tensors_and_anomaly_mode)
    test_autocast = staticmethod(with_torch.test_autocast)


def test_several_backwards() -> None:
    with_torch.test_several_backwards(RUNS["steps"])


@both_ways
@runs
def test_after_a_backward_that_failed(build: Build) -> None:
    """In the middle of the run: the next one through the same graph finds nothing of it."""
    sequence, x = build().eval(), batch()
    sequence.memory = "store"
    expected = gradients(sequence, x)
    named = dict(sequence.named_parameters())

    def fails(grad: torch.Tensor) -> torch.Tensor:
        raise MemoryError("planted")

    for memory in (*RECOMPUTING[:4], Memory("reversible", 2, tolerance=1e-30)):
        value = objective(memory.of(sequence)(x))
        handle = next(parameter for name, parameter in named.items() if name.startswith("3")).register_hook(fails)
        with pytest.raises(MemoryError, match="planted"):
            value.backward(retain_graph=True)
        handle.remove()
        found = torch.autograd.grad(value, list(named.values()))
        wanted = {name: expected[name] for name in named}
        assert_same_gradients(dict(zip(named, found, strict=True)), wanted, memory)
        sequence.zero_grad()


@both_ways
def test_late_gradients_alone_are_no_pass(way: str) -> None:
    """The backward of the whole run is counted, with the steps that it redoes itself."""
    steps = pgf.ReversibleSequence([pgf.FlowStep(4, 5) for _ in range(4)], anchor_every=2, tolerance=1e-30).double()
    steps.initialize(batch(8))
    objective(steps(batch())).backward()
    redone = steps.memory_report()["redone_steps"]
    value = objective(steps(batch()))
    last = steps[0 if way == "inverse" else 3]
    torch.autograd.grad(value, last.coupling.net.conv1.weight, retain_graph=True)
    assert steps.memory_report()["passes"] == 1
    value.backward()
    assert (steps.memory_report()["passes"], steps.memory_report()["redone_steps"]) == (2, 2 * redone)


def test_gradients_that_are_added_to_others_exist_twice_by_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    steps = pgf.ReversibleSequence([pgf.FlowStep(4, 64) for _ in range(16)], anchor_every=4)
    x = torch.randn(1, 4, 4, 4)
    steps.initialize(torch.randn(8, 4, 4, 4))
    size = sum(p.nbytes for p in steps.parameters())
    peaks = {}
    for limit in (ONE_PART, EVERY_STEP):
        cut_parts(monkeypatch, limit)
        model = copy.deepcopy(steps)
        Memory("reversible", 4).apply(model)
        objective(model(x)).backward()
        with MemoryMeter() as meter:
            objective(model(x)).backward()
        peaks[limit] = meter.peak
    assert peaks[ONE_PART] > size > 4 * peaks[EVERY_STEP]
